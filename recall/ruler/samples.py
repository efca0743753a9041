"""One question of a benchmark, and how long its text may become."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from design_models import ModelError

Count = Callable[[str], int]
"""How many tokens a text is, in the model's own."""

_TRIES = 100


@dataclass(frozen=True)
class Sample:
    """What is read, and what is right to say after it.

    Args:
        prompt: the text, up to where the answer begins.
        answers: each of which counts.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """How long texts may be.

    Args:
        task: whose texts they are.
        length: tokens of a text, answer included.
        answer: tokens that are generated.
        count: how many tokens a text is.
        beside: tokens that are put in front of the text.
    """

    task: str
    length: int
    answer: int
    count: Count
    beside: int = 0

    def holds(self, text: str) -> bool:
        return self._taken(text) <= self.length

    def most(self, text: str, size: int) -> int:
        """A size that is too large: three times what a text of `size` lets one expect."""
        return max(int(self.length / (self.count(text) / size) * 3), 2 * size)

    def too_short(self, text: str) -> ModelError:
        """What to say where not even the shortest text fits."""
        return ModelError(
            f"`--lengths` is {self.length}, too short for {self.task}: its shortest text is about "
            f"{self._taken(text)} tokens, {self.answer} of them for the answer; ask for more, or "
            "leave it out with --tasks."
        )

    def _taken(self, text: str) -> int:
        return self.beside + self.count(text) + self.answer


def largest(draw: Callable[[int], Sample], least: int, most: int, room: Room) -> int:
    """The largest size that fits, by halving; `least` where none does.

    Every size that is tried draws a text, as upstream does, which uses up random numbers.
    """
    found, low, high = least, least, most
    while low <= high:
        middle = (low + high) // 2
        if room.holds(draw(middle).prompt):
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found


def fitting(
    draw: Callable[[int], Sample], size: int, step: int, room: Room, *, least: int = 1
) -> Iterator[Sample]:
    """Samples without end: where one is too long, others are drawn, smaller by `step` each.

    Args:
        draw: makes a sample of a size.
        size: to begin with.
        step: what a size loses; one that is not above it stays.
        room: that each sample must fit in.
        least: the smallest size there is.

    Raises:
        ModelError: a hundred draws do not fit.
    """
    while True:
        used = size
        for _ in range(_TRIES):
            sample = draw(used)
            if room.holds(sample.prompt):
                yield sample
                break
            if used > step and used - step >= least:
                used -= step
        else:
            raise room.too_short(draw(used).prompt)
