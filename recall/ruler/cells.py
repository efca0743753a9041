"""A task at a length: samples drawn, answers said, scored; and kept in a folder once finished."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from design_models import ModelError
from recall.records import write_json

from .catalogue import Task
from .scores import interval
from .tokens import Vocabulary

Tokens = Int[np.ndarray, "_"]


@runtime_checkable
class Speaker(Protocol):
    """Whatever goes on with texts; `generation.Generator` does."""

    def rows(self, length: int) -> int: ...

    def __call__(self, texts: Sequence[Tokens], length: int, count: int) -> list[Tokens]: ...


@dataclass(frozen=True)
class Answer:
    """What was said after one sample.

    Args:
        read: tokens of the prompt.
        right: what is right to say.
        said: what was said.
        score: share of what is right that was said.
    """

    read: int
    right: tuple[str, ...]
    said: str
    score: float


@dataclass(frozen=True)
class Cell:
    """A task at a length.

    Args:
        task: its name.
        length: of texts, answers included.
        answers: to each sample.
        seconds: that it took.
    """

    task: str
    length: int
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def score(self) -> float:
        return float(np.mean([answer.score for answer in self.answers]))

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.score, len(self.answers))

    def as_record(self) -> dict[str, Any]:
        """In percent, as upstream; without the answers."""
        low, high = self.interval
        return {
            "task": self.task,
            "length": self.length,
            "score": round(100 * self.score, 2),
            "interval": [round(100 * low, 2), round(100 * high, 2)],
            "samples": len(self.answers),
            "tokens_read": round(float(np.mean([answer.read for answer in self.answers])), 1),
            "empty": sum(not answer.said.strip() for answer in self.answers),
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Texts:
    """What samples are drawn with.

    Args:
        samples: how many of each task and length.
        seed: of all draws.
        prose: words of the haystacks that are prose.
    """

    samples: int
    seed: int
    prose: Sequence[str]


def measure(
    task: Task,
    length: int,
    texts: Texts,
    vocabulary: Vocabulary,
    speaker: Speaker,
    stage: Callable[[str], None] = lambda words: None,
) -> Cell:
    """Ask a model all samples of a task at a length.

    Raises:
        ModelError: texts do not fit in the length.
    """
    start, answers = time.perf_counter(), []
    drawn = islice(task.samples(length, texts.seed, vocabulary.count, texts.prose), texts.samples)
    while batch := list(islice(drawn, speaker.rows(length))):
        stage(f"{task.name} at {length}: {len(answers)} of {texts.samples}")
        read = [vocabulary.read(sample.prompt) for sample in batch]
        said = [vocabulary.words(one) for one in speaker(read, length, task.drawn.answer)]
        answers += [
            Answer(len(tokens), sample.answers, words, task.score(words, sample.answers))
            for tokens, sample, words in zip(read, batch, said, strict=True)
        ]
    return Cell(task.name, length, tuple(answers), time.perf_counter() - start)


@dataclass(frozen=True)
class CellFolder:
    """Where finished cells are kept.

    Args:
        path: of the folder.
    """

    path: Path

    def read(self, task: str, length: int, setting: Mapping[str, Any]) -> Cell | None:
        """A cell that is finished.

        Args:
            task: its name.
            length: of texts.
            setting: what it must have been measured with.

        Raises:
            ModelError: it was measured otherwise, or cannot be read.
        """
        file = self._file(task, length)
        if not file.is_file():
            return None
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            answers = [
                Answer(one["read"], tuple(one["right"]), one["said"], one["score"])
                for one in held["answers"]
            ]
            found = Cell(task, length, tuple(answers), held["seconds"])
            differs = [name for name in setting if held["setting"].get(name) != setting[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} cannot be read; remove it to measure it again.") from error
        if differs:
            name = differs[0]
            raise ModelError(
                f"`--out` is {self.path}, where {file.name} was measured with other {name} "
                f"({held['setting'].get(name)!r}, now {setting[name]!r}); name another folder."
            )
        return found

    def write(self, cell: Cell, setting: Mapping[str, Any]) -> None:
        """Keep a cell; a kill leaves all of it or nothing.

        Raises:
            ModelError: it cannot be written.
        """
        file = self._file(cell.task, cell.length)
        held = {
            "setting": dict(setting),
            **cell.as_record(),
            "seconds": cell.seconds,
            "answers": [asdict(answer) for answer in cell.answers],
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(".new")
            write_json(beside, held)
            beside.replace(file)
        except OSError as error:
            raise ModelError(f"`--out` is {self.path}: {error.strerror}.") from error

    def _file(self, task: str, length: int) -> Path:
        return self.path / "cells" / f"{task}-{length}.json"
