"""English words, from the lists of the package that RULER takes them from.

Source: wonderwords (MIT), whose lists make the texts of a seed what they are.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Literal, overload

from design_models import ModelError

Part = Literal["noun", "adjective", "verb"]


@cache
def words(part: Part) -> tuple[str, ...]:
    """A list of wonderwords, in its order.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        folder = resources.files("wonderwords.assets")
    except ModuleNotFoundError as error:
        raise ModelError(
            "the words of RULER's texts are those of a package that is not installed; run "
            "pip install wonderwords==3.0.1."
        ) from error
    text = (folder / f"{part}list.txt").read_text(encoding="utf-8")
    return tuple(line.rstrip() for line in text.splitlines())


class Pairs(Sequence[str]):
    """`sorted({f"{first}-{second}" ...})` of all firsts and seconds, without making them all."""

    def __init__(self, firsts: Sequence[str], seconds: Sequence[str]) -> None:
        self._seconds = sorted(set(seconds))
        self._groups: list[list[str]] = []
        for head in sorted({f"{first}-" for first in firsts}):
            if self._groups and head.startswith(self._groups[-1][0]):
                self._groups[-1].append(head)  # as blue- and blue-eyed-, whose pairs mingle
            else:
                self._groups.append([head])
        self._mingled: dict[int, list[str]] = {}
        sizes = []
        for number, group in enumerate(self._groups):
            if len(group) > 1:
                pairs = {head + second for head in group for second in self._seconds}
                self._mingled[number] = sorted(pairs)
            sizes.append(len(self._mingled.get(number, self._seconds)))
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        if number in self._mingled:
            return self._mingled[number][place]
        return self._groups[number][0] + self._seconds[place]


def edition() -> str | None:
    """Which lists they are; None where there are none."""
    try:
        return f"wonderwords {version('wonderwords')}"
    except PackageNotFoundError:
        return None


@cache
def adjectives_with_nouns() -> Pairs:
    """Over six million keys."""
    return Pairs(words("adjective"), words("noun"))
