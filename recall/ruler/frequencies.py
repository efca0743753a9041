"""Words that come more often than others: which are they?

Source: RULER's common words (`cwe`) and frequent words (`fwe`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
from scipy.special import zeta

from design_models import ModelError

from .samples import Room, Sample, fitting, largest
from .words import words

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words are:"
)

_SHORTEST = 200
"""Tokens for which four words are coded."""


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come thirty times and the rest three times.

    Below 4,096 tokens, six times and once. One worked example is in front.

    Args:
        answer: tokens that are generated.
    """

    answer: int = 120

    def samples(self, room: Room, seed: int) -> Iterator[Sample]:
        """Samples without end.

        Raises:
            ModelError: there is too little room, or too much for the words that there are.
        """
        known = sorted({*words("noun"), *words("adjective"), *words("verb")})
        random.Random(seed).shuffle(known)
        rng = random.Random(seed)
        shown, repeats = ((20, 3, 1), (6, 1)) if room.length < 4096 else ((40, 10, 3), (30, 3))

        def numbered(size: int, often: int, seldom: int) -> tuple[str, list[str]]:
            chosen = rng.sample(known, size)
            common, rest = chosen[:10], chosen[10:]
            drawn = common * often + rest * seldom
            random.Random(seed).shuffle(drawn)
            return _COMMON.format(context=_numbered(drawn)), common

        def draw(size: int) -> Sample:
            if size > len(known):
                raise ModelError(
                    f"`--lengths` is {room.length}: {room.task} knows {len(known)} words, too few "
                    "for so long a text; ask for less, or leave it out with --tasks."
                )
            example, answers = numbered(*shown)
            text, common = numbered(size, *repeats)
            return Sample(f"{example} {_numbered(answers)}\n{text}", tuple(common))

        tokens = room.count(draw(4096).prompt) / 4096
        size = largest(draw, 10, max(2 * int(room.length // tokens), 20), room)
        return fitting(draw, size, 10, room, least=10)


def _numbered(drawn: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(drawn, 1))


@dataclass(frozen=True)
class FrequentWords:
    """Coded words in a text, the word of rank r a number of times ∝ 1/r²; ranks 2 to 4 are asked.

    The first rank's are dots. Upstream leaves no room for the answer; here it is part of the
    length, so that a text of L tokens is upstream's of L - `answer`.

    Args:
        answer: tokens that are generated.
        letters: of a coded word.
        exponent: of the rank.
    """

    answer: int = 50
    letters: int = 6
    exponent: float = 2.0

    def samples(self, room: Room, seed: int) -> Iterator[Sample]:
        """Samples without end.

        Raises:
            ModelError: there is too little room.
        """
        limit, rng = room.length - self.answer, random.Random(seed)
        if limit < _SHORTEST:
            raise room.too_short(self._texts(_SHORTEST, rng, seed)(_SHORTEST).prompt)
        size, step, text = limit // self.letters, limit // 32, self._texts(limit, rng, seed)
        while room.count(text(size).prompt) < limit:
            size += step
        return self._fitting(size - step, step, room, rng, seed)

    def _fitting(
        self, size: int, step: int, room: Room, rng: random.Random, seed: int
    ) -> Iterator[Sample]:
        while True:
            text, used = self._texts(room.length - self.answer, rng, seed), size
            while not room.holds(text(used).prompt):
                if used <= step:
                    raise room.too_short(text(used).prompt)
                used -= step
            yield text(used)

    def _texts(self, limit: int, rng: random.Random, seed: int) -> Callable[[int], Sample]:
        """Texts of one draw of words, of any size."""
        count = limit // 50
        drawn = [self._word(rng) for _ in range(count)]
        while len(set(drawn)) < count:
            drawn.append(self._word(rng))
        coded = sorted(set(drawn))
        random.Random(seed).shuffle(coded)
        coded[0] = "..."

        def text(size: int) -> Sample:
            ranks = np.arange(1, count + 1)
            times = (size * (ranks**-self.exponent) / zeta(self.exponent)).astype(int)
            words = [word for word, often in zip(coded, times, strict=True) for _ in range(often)]
            random.Random(seed).shuffle(words)
            return Sample(_FREQUENT.format(context=" ".join(words)), tuple(coded[1:4]))

        return text

    def _word(self, rng: random.Random) -> str:
        return "".join(rng.choices(ascii_lowercase, k=self.letters))
