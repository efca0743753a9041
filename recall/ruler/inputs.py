"""What a run of RULER is asked to do, read from files and checked before anything is measured."""

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from design_models import ModelError
from recall.text.documents import read_documents

from .catalogue import TASKS, Task, question_task
from .cells import Texts
from .questions import read_questions
from .samples import Count

PROSE = "prose.txt.xz"
"""Civil Disobedience (Thoreau, 1849) and the first chapters of Persuasion (Austen, 1818)."""


def chosen_tasks(names: Sequence[str] | None, qa: Sequence[Path]) -> list[Task]:
    """The tasks of these names, in their order; all where none are named.

    Raises:
        ModelError: there is no such task, or it needs a file.
    """
    known = dict(TASKS)
    for path in qa:
        name, questions = read_questions(path)
        if name in known:
            raise ModelError(f"`--qa` gives two files for {name}; give one.")
        known[name] = question_task(name, questions)
    for name in names or ():
        if name in ("qa_1", "qa_2") and name not in known:
            kind = "SQuAD" if name == "qa_1" else "HotpotQA"
            raise ModelError(
                f"`--tasks` names {name}; give its data, --qa FILE in {kind}'s format."
            )
        if name not in known:
            raise ModelError(f"`--tasks` names {name!r}; known: {', '.join(known)}.")
    return [known[name] for name in names or known]


def read_prose(path: Path | None) -> str:
    """A file of prose, or that which comes along.

    Raises:
        ModelError: it cannot be read, or holds no text.
    """
    try:
        if path is not None:
            return " ".join(read_documents([path]))
        with resources.as_file(resources.files("recall") / "data" / PROSE) as shipped:
            return " ".join(read_documents([shipped]))
    except ModelError as error:
        raise ModelError(str(error).replace("`TEXT`", "`--prose`", 1)) from error


def first_samples(cells: Sequence[tuple[Task, int]], texts: Texts, count: Count) -> None:
    """Draw a first sample of every cell.

    Raises:
        ModelError: a task does not fit in a length, which is known before hours of work.
    """
    for task, length in cells:
        next(task.samples(length, texts.seed, count, texts.prose))


def digest(paths: Sequence[Path]) -> str:
    """What tells files from any others."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(path.name.encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]
