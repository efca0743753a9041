"""Recall and copying tasks of the mechanistic architecture design (MAD) suite.

In each, a value is fixed by the first pair that shows its key, and is asked for where the key comes
again. Training labels are the next token at every position; test labels hold only what the sequence
decides, −100 elsewhere.

Draws follow the original's order, one `numpy.random.Generator` for all rows, with two differences:
selective copying draws the places of its blanks from that generator too (the original takes them
from NumPy's global state), and fuzzy recall always shows the pair it asks for (the original may run
out of room before).

Source: Poli et al. (2024), arXiv 2403.17844; athms/mad-lab, `mad/data/instances.py`.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from jaxtyping import Int

from design_models import ModelError

from ..mqar import UNLABELLED

Row = tuple[list[int], list[int]]
"""A row's tokens, and what the row itself decides at each."""

Tokens = Int[np.ndarray, "row position"]


@dataclass(frozen=True)
class InContextRecall:
    """Pairs of one key and one value; a key that comes again asks for its value.

    Args:
        vocabulary: number of tokens: keys, then values, then noise.
        length: positions of a row; even.
        noise_vocabulary: how many tokens are noise.
        noise: probability that a pair is noise.
    """

    vocabulary: int = 16
    length: int = 128
    noise_vocabulary: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check_even(self.length)
        _check_noise(self.noise, self.noise_vocabulary)
        _check_vocabulary(self.vocabulary, self.noise_vocabulary + 2)

    @property
    def most_asked(self) -> int:
        """Questions that a row can hold."""
        return self.length // 2

    def row(self, rng: np.random.Generator, training: bool) -> Row:
        """Draw one row; test rows follow the same law as training rows."""
        size = self.vocabulary - self.noise_vocabulary
        pairs = self.length // 2
        values: dict[int, int] = {}
        tokens: list[int] = []
        decided: list[int] = []
        certain = rng.choice(pairs)  # at least one pair is no noise
        for place in range(pairs - 1):
            if place != certain and self.noise > 0 and rng.random() < self.noise:
                noise = np.arange(size, self.vocabulary)
                tokens += rng.choice(noise, size=2, replace=True).tolist()
                decided += [UNLABELLED] * 2
                continue
            key = int(rng.choice(np.arange(size // 2)))
            seen = key in values
            if not seen:
                values[key] = int(rng.choice(np.arange(size // 2, size)))
            tokens += [key, values[key]]
            decided += [UNLABELLED, values[key] if seen else UNLABELLED]
        if not values:  # the pair that is no noise was to be the last
            values[0] = int(rng.choice(np.arange(size // 2, size)))
        key = int(rng.choice(list(values)))
        return [*tokens, key, values[key]], [*decided, UNLABELLED, values[key]]


@dataclass(frozen=True)
class FuzzyRecall:
    """Keys and values are motifs of up to so many different tokens, as permutations of some.

    Args:
        vocabulary: number of tokens: keys, then values, then one for padding on the left.
        length: positions of a row.
        key_motif: largest number of tokens in a key; test keys have this many.
        value_motif: largest number of tokens in a value.
    """

    vocabulary: int = 16
    length: int = 128
    key_motif: int = 3
    value_motif: int = 3

    def __post_init__(self) -> None:
        if min(self.key_motif, self.value_motif) < 1:
            raise ModelError(
                f"`key_motif` is {self.key_motif} and `value_motif` {self.value_motif}; both must "
                "be at least 1."
            )
        _check_vocabulary(self.vocabulary, 2 * max(self.key_motif, self.value_motif) + 1)
        shortest = 3 * (self.key_motif + self.value_motif)
        if self.length <= shortest:
            raise ModelError(
                f"`length` is {self.length}; motifs of {self.key_motif} and {self.value_motif} "
                f"take more than {shortest}."
            )

    @property
    def most_asked(self) -> int:
        """Questions that a row can hold."""
        return self.length

    def row(self, rng: np.random.Generator, training: bool) -> Row:
        """Draw one row, a token longer than `length`, padded on the left."""
        padding = size = self.vocabulary - 1
        shortest = 1 if training else self.key_motif
        keys = _motifs(rng, range(size // 2), range(shortest, self.key_motif + 1))
        values = _motifs(rng, range(size // 2, size), range(1, self.value_motif + 1))

        def draw_size(motifs: dict[int, list]) -> int:
            return int(rng.choice(list(motifs)))

        def draw_key_size() -> int:
            return draw_size(keys) if training else self.key_motif

        def draw(motifs: list) -> tuple[int, ...]:
            return tuple(int(token) for token in rng.choice(np.array(motifs)))

        key_size = draw_key_size()
        value_size = draw_size(values)
        asked, answer = draw(keys[key_size]), draw(values[value_size])
        room = self.length - key_size - value_size
        longest = self.key_motif + self.value_motif
        # Pairs are at most `longest`, so that one begins in the last `longest` places of the room.
        place = min(rng.choice(room - key_size - value_size), room - 2 * longest)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        shown: set[tuple[int, ...]] = set()
        tokens: list[int] = []
        decided: list[int] = []
        placed = False
        while len(tokens) < room - longest:
            size_of_key, size_of_value = draw_key_size(), draw_size(values)
            if len(tokens) >= place and not placed:
                key, known[asked], placed = asked, answer, True
                again = False
            else:
                key = draw(keys[size_of_key])
                if key == asked:
                    known[asked], placed = answer, True
                elif key not in known:
                    known[key] = draw(values[size_of_value])
                again = key in shown
            shown.add(key)
            tokens += [*key, *known[key]]
            blank = [UNLABELLED] * len(known[key])
            decided += [UNLABELLED] * len(key) + (list(known[key]) if again else blank)
        tokens += [*asked, *answer]
        decided += [UNLABELLED] * key_size + list(answer)
        missing = self.length + 1 - len(tokens)
        return [padding] * missing + tokens, [UNLABELLED] * missing + decided


@dataclass(frozen=True)
class SelectiveCopy:
    """Tokens among blanks, then a sign, then the same tokens without the blanks.

    Args:
        vocabulary: number of tokens; the last is the sign to copy, the one before it the blank.
        length: positions of a row.
        copied: how many tokens are copied.
    """

    vocabulary: int = 16
    length: int = 256
    copied: int = 16

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocabulary, 3)
        if self.copied < 1 or self.length <= 2 * self.copied + 1:
            raise ModelError(
                f"`copied` is {self.copied} and `length` {self.length}; a row takes more than "
                "twice as many positions as tokens copied, and one."
            )

    @property
    def most_asked(self) -> int:
        """Questions that a row can hold."""
        return self.copied

    def row(self, rng: np.random.Generator, training: bool) -> Row:
        """Draw one row: its labels stand at the positions of the answers themselves."""
        blank, sign = self.vocabulary - 2, self.vocabulary - 1
        blanks = self.length - 2 * self.copied - 1
        copied = rng.choice(np.arange(blank), size=self.copied, replace=True)
        places = rng.integers(0, self.copied, blanks)  # never after the last token
        tokens = np.insert(copied, places, np.full(blanks, blank)).tolist()
        unlabelled = [UNLABELLED] * (self.copied + blanks + 1)
        return [*tokens, sign, *[blank] * self.copied], [*unlabelled, *copied.tolist()]


Mad = InContextRecall | FuzzyRecall | SelectiveCopy


def draw(task: Mad, examples: int, seed: int, *, training: bool) -> tuple[Tokens, Tokens]:
    """Draw rows: inputs, and labels at the position from which each is predicted."""
    rng = np.random.default_rng(seed)
    rows = [task.row(rng, training) for _ in range(examples)]
    tokens = np.array([row[0] for row in rows], np.int32)
    decided = np.array([row[1] for row in rows], np.int32)
    if isinstance(task, SelectiveCopy):
        return tokens, decided
    return tokens[:, :-1], tokens[:, 1:] if training else decided[:, 1:]


def _motifs(rng: np.random.Generator, tokens: range, sizes: range) -> dict[int, list]:
    found = {}
    for size in sizes:
        found[size] = list(permutations(tokens, size))
        rng.shuffle(found[size])
    return found


def _check_even(length: int) -> None:
    if length < 4 or length % 2:
        raise ModelError(f"`length` is {length}; it must be even, at least 4.")


def _check_noise(noise: float, tokens: int) -> None:
    if not 0 <= noise < 1 or tokens < (noise > 0):
        raise ModelError(
            f"`noise` is {noise} with `noise_vocab` {tokens}; noise lies in [0, 1) and, above 0, "
            "needs tokens of its own."
        )


def _check_vocabulary(vocabulary: int, fewest: int) -> None:
    if vocabulary < fewest:
        raise ModelError(f"`vocab` is {vocabulary}; this task needs at least {fewest} tokens.")
