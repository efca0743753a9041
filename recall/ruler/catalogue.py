"""RULER's tasks by name: what is drawn, and how what is said is scored.

A name that ends in _prose is upstream's task without its essays, on prose of the public domain.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .frequencies import CommonWords, FrequentWords
from .needles import Needles
from .questions import Questions
from .samples import Count, Room, Sample
from .scores import found_all, found_any
from .variables import Variables


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: its name.
        drawn: what samples are drawn from.
        score: what is said and what is right → a share in [0, 1].
    """

    name: str
    drawn: Needles | Variables | CommonWords | FrequentWords | Questions
    score: Callable[[str, Sequence[str]], float] = found_all

    @property
    def in_prose(self) -> bool:
        return isinstance(self.drawn, Needles) and self.drawn.haystack == "prose"

    def samples(
        self, length: int, seed: int, count: Count, prose: Sequence[str]
    ) -> Iterator[Sample]:
        """Samples of at most `length` tokens, answers included, as `count` counts them.

        Raises:
            ModelError: there is too little room.
        """
        room = Room(self.name, length, self.drawn.answer, count)
        if isinstance(self.drawn, Needles):
            return self.drawn.samples(room, seed, prose)
        return self.drawn.samples(room, seed)


_PROSE = Needles("prose")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single_1", Needles("noise")),
        Task("niah_single_2_prose", _PROSE),
        Task("niah_single_3_prose", replace(_PROSE, values="uuids")),
        Task("niah_multikey_1_prose", replace(_PROSE, hidden=4)),
        Task("niah_multikey_2", Needles("needles")),
        Task("niah_multikey_3", Needles("needles", keys="uuids", values="uuids")),
        Task("niah_multivalue_prose", replace(_PROSE, each=4)),
        Task("niah_multiquery_prose", replace(_PROSE, hidden=4, asked=4)),
        Task("vt", Variables()),
        Task("cwe", CommonWords()),
        Task("fwe", FrequentWords()),
    )
}
"""Those that need no data; `qa_1` and `qa_2` come with a file."""


def question_task(name: str, questions: Questions) -> Task:
    """`qa_1` or `qa_2`, asked from a file."""
    return Task(name, questions, found_any)
