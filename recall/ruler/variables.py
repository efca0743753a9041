"""Chains of variables that hand on a value, hidden in noise: which have the value?

Source: RULER's variable tracking (`vt`), with its one worked example in front of every question.
Upstream counts the example's tokens before its names are changed; here the whole text is counted,
so that another is drawn where it has become too long.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from recall.text.wording import NOISE

from .samples import Room, Sample, fitting, largest

_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
_EXAMPLE_LENGTH, _EXAMPLE_VALUE = 500, "12345"


@dataclass(frozen=True)
class Variables:
    """A task of one chain.

    Args:
        hops: assignments of a variable to the next.
        answer: tokens that are generated.
    """

    hops: int = 4
    answer: int = 30

    def samples(self, room: Room, seed: int) -> Iterator[Sample]:
        """Samples without end.

        Raises:
            ModelError: there is too little room.
        """
        draws = self._draws(seed)
        shown = draws.sample
        small = Room(room.task, self._example_length(room), 0, room.count)
        size = largest(draws.example, 5, small.most(draws.example(5).prompt, 5), small)
        example = next(fitting(draws.example, size, 5, small, least=self.hops + 1))
        worked = f"{example.prompt} {' '.join(example.answers)}\n"
        rest = replace(room, beside=room.count(worked))
        step = 5 if room.length < 4096 else 10
        size = largest(shown, step, room.most(shown(step).prompt, step), rest)

        def draw(size: int) -> Sample:
            sample = shown(size)
            return Sample(f"{draws.another(worked)}\n{sample.prompt}", sample.answers)

        return fitting(draw, size, step, room, least=self.hops + 1)

    def _draws(self, seed: int) -> "_Draws":
        return _Draws(self.hops, random.Random(seed), np.random.RandomState(seed))

    def _example_length(self, room: Room) -> int:
        """500 tokens, as upstream; more where five lines take more, for which upstream has none."""
        least = room.count(self._draws(0).example(5).prompt)
        return _EXAMPLE_LENGTH if least <= _EXAMPLE_LENGTH else int(1.2 * least)


@dataclass(frozen=True)
class _Draws:
    hops: int
    rng: random.Random
    numbers: np.random.RandomState

    def sample(self, size: int) -> Sample:
        return self._chain_in_noise(size, 5, None)

    def example(self, size: int) -> Sample:
        return self._chain_in_noise(size, 3, _EXAMPLE_VALUE)

    def another(self, worked: str) -> str:
        """The worked example with other names and another value."""
        for name in worked.split()[-self.hops - 1 :]:
            worked = worked.replace(name, self._name(len(name)))
        return worked.replace(_EXAMPLE_VALUE, self._value())

    def _chain_in_noise(self, size: int, letters: int, value: str | None) -> Sample:
        names = [self._name(letters) for _ in range(self.hops + 1)]
        while len(set(names)) < self.hops + 1:
            names.append(self._name(letters))
        names = names[: self.hops + 1]
        value = self._value() if value is None else value
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {later} = VAR {name} " for name, later in pairwise(names)]
        lines = [NOISE] * size
        places = sorted(self.rng.sample(range(size), len(chain)))
        for number, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + number, line)
        text = _TEXT.format(context="\n".join(lines), value=value, count=self.hops + 1)
        return Sample(text, tuple(names))

    def _name(self, letters: int) -> str:
        return "".join(self.rng.choices(ascii_uppercase, k=letters))

    def _value(self) -> str:
        return str(self.numbers.randint(10000, 99999))
