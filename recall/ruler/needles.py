"""Needles in a haystack: values hidden in a long text, and asked for at its end.

Source: RULER (Hsieh et al., 2024, arXiv 2404.06654), github.com/NVIDIA/RULER, `niah`. Where the
haystack is noise or needles, texts are upstream's own for the same seed and the same count of
tokens. Where it is prose, upstream's essays are not ours to give; all else is the same, but for
where sentences end, and for haystacks of fewer than 500 words, which upstream does not make.
"""

import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recall.text.wording import NEEDLE, NOISE, prompt

from .samples import Room, Sample, fitting, largest
from .words import adjectives_with_nouns

Kind = Literal["words", "numbers", "uuids"]

_DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*[A-Z0-9])""")


@dataclass(frozen=True)
class Needles:
    """A task of hidden values.

    Args:
        haystack: "noise"; "needles", where every line hides a value; or "prose".
        keys: what keys are.
        values: what values are.
        hidden: keys whose values are hidden.
        each: values of a key.
        asked: keys that are asked for.
        answer: tokens that are generated.
    """

    haystack: Literal["noise", "needles", "prose"]
    keys: Kind = "words"
    values: Kind = "numbers"
    hidden: int = 1
    each: int = 1
    asked: int = 1
    answer: int = 128

    def samples(self, room: Room, seed: int, prose: Sequence[str] = ()) -> Iterator[Sample]:
        """Samples without end.

        Args:
            room: how long they may be.
            seed: of all draws.
            prose: words, read from the first on, and again where they run out.

        Raises:
            ModelError: there is too little room.
        """
        step = 500 if self.haystack == "prose" else 25
        if room.length < 4096:
            step = 50 if self.haystack == "prose" else 5
        rng = random.Random(seed)
        lines = _lines_of(prose)

        def draw(size: int) -> Sample:
            return self._sample(size, rng, seed, lines)

        most = room.most(draw(step).prompt, step)
        size = largest(draw, step, most, room)
        return fitting(draw, size, step, room, least=self.hidden * self.each)

    def _sample(
        self, size: int, rng: random.Random, seed: int, lines: Callable[[int], list[str]]
    ) -> Sample:
        keys, values, needles = [], [], []
        for _ in range(self.hidden):
            keys.append(_drawn(self.keys, rng))
            values.append([])
            for _ in range(self.each):
                values[-1].append(_drawn(self.values, rng))
                needles.append(self._needle(keys[-1], values[-1][-1]))
        random.Random(seed).shuffle(needles)
        if self.haystack == "prose":
            context = _among_sentences(needles, lines(size), rng)
        else:
            context = self._among_lines(needles, size, rng)
        chosen = rng.sample(range(self.hidden), self.asked)
        answers = tuple(value for place in chosen for value in values[place])
        asked = [keys[place] for place in chosen]
        return Sample(prompt(self.values, context, asked, len(answers)), answers)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _among_lines(self, needles: Sequence[str], size: int, rng: random.Random) -> str:
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                self._needle(_drawn(self.keys, rng), _drawn(self.values, rng)) for _ in range(size)
            ]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _among_sentences(needles: Sequence[str], sentences: Sequence[str], rng: random.Random) -> str:
    depths = rng.sample(_DEPTHS, len(needles))
    places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths)]
    parts = []
    for number, needle in enumerate(needles):
        parts += [" ".join(sentences[places[number] : places[number + 1]]), needle]
    return " ".join([*parts, " ".join(sentences[places[-1] :])])


def _lines_of(prose: Sequence[str]) -> Callable[[int], list[str]]:
    """The sentences of the first words of the prose, as many as one asks for."""
    found: dict[int, list[str]] = {}

    def lines(size: int) -> list[str]:
        if size not in found:
            words = (list(prose) * -(-size // len(prose)))[:size]
            found.clear()
            found[size] = _SENTENCE_END.split(" ".join(words))
        return found[size]

    return lines


def _drawn(kind: Kind, rng: random.Random) -> str:
    match kind:
        case "words":
            return rng.choice(adjectives_with_nouns())
        case "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        case "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
