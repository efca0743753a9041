"""Zoology's multi-query associative recall, bit for bit, and its variant with overwrites.

A row is `k1 v1 k2 v2 ... | queries`: K pairs (then U more that overwrite some), and every key once
more at an even place after them, the sooner the likelier. Its label, at the same position, is the
value last written with it. Keys are tokens from 1 to V/2 − 1, values from V/2 to V − 1, and 0 is
the filler, which may be replaced by any token of the vocabulary.

Draws follow NumPy's legacy generator in the original's order: all rows' keys, all rows' values, the
overwrites, then all rows' gaps. Filler tokens are 32-bit Mersenne numbers modulo V, as PyTorch
draws them on a CPU after `torch.manual_seed`.

Source: Arora et al. (2023), arXiv 2312.04927; HazyResearch/zoology, `multiquery_ar` and
`forgetting_mqar`. Upstream's `num_passes` above 1 raises; it is left out.
"""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int

from design_models import ModelError

from ..mqar import UNLABELLED


@dataclass(frozen=True)
class Zoology:
    """A segment of the data: rows of one shape.

    Args:
        vocabulary: V, number of tokens.
        length: L, positions of a row; even.
        pairs: K, different keys of a row.
        overwrites: U, pairs after the first K that give a key another value.
        power: gaps g have probability ∝ g^(power − 1); 1 is uniform, 0.01 crowds queries early.

    Raises:
        ModelError: the parts do not fit.
    """

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 8
    overwrites: int = 0
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.length % 2 or not 2 <= self.length < self.vocabulary:
            raise ModelError(
                f"`length` is {self.length} with `vocab` {self.vocabulary}; it must be even, at "
                "least 2 and below the vocabulary."
            )
        if not 1 <= self.pairs < self.vocabulary // 2:
            raise ModelError(
                f"`pairs` is {self.pairs}; a vocabulary of {self.vocabulary} has "
                f"{self.vocabulary // 2 - 1} keys."
            )
        if not 0 <= self.overwrites <= self.pairs:
            raise ModelError(
                f"`overwrites` is {self.overwrites}; it must lie between 0 and {self.pairs} pairs."
            )
        if self.context + 2 * self.pairs > self.length:
            raise ModelError(
                f"`length` is {self.length}; {self.pairs} pairs, {self.overwrites} overwrites and "
                f"{self.pairs} queries take {self.context + 2 * self.pairs} positions."
            )
        if not self.power > 0:
            raise ModelError(f"`power` is {self.power}; it must be above 0.")

    @property
    def most_asked(self) -> int:
        """Questions that a row can hold."""
        return self.pairs

    @property
    def context(self) -> int:
        """Positions that the pairs take."""
        return 2 * (self.pairs + self.overwrites)

    @property
    def config(self) -> dict[str, int | float]:
        """The original's names for what was drawn."""
        found = asdict(self)
        names = {
            "vocabulary": "vocab_size",
            "length": "input_seq_len",
            "pairs": "num_kv_pairs",
            "overwrites": "num_updates",
            "power": "power_a",
        }
        return {names[name]: value for name, value in found.items()}


def draw(
    segment: Zoology, examples: int, seed: int, filler_seed: int | None = None
) -> tuple[Int[np.ndarray, "row position"], Int[np.ndarray, "row position"]]:
    """Draw rows and their labels.

    Args:
        segment: their shape.
        examples: how many rows.
        seed: of NumPy's legacy generator.
        filler_seed: of the tokens that replace fillers; they stay 0 where left out.

    Returns:
        Inputs and labels; labels are -100 where nothing is asked.
    """
    rng = np.random.RandomState(seed)
    half = segment.vocabulary // 2
    keys = _rows_of_choices(rng, np.arange(1, half), examples, segment.pairs)
    values = _rows_of_choices(rng, np.arange(half, segment.vocabulary), examples, segment.pairs)
    written_keys, written_values, last = keys, values, values
    if segment.overwrites:
        updates, places = _overwrites(rng, segment, values)
        written_keys = np.concatenate([keys, np.take_along_axis(keys, places, 1)], axis=1)
        written_values = np.concatenate([values, updates], axis=1)
        last = values.copy()
        np.put_along_axis(last, places, updates, 1)
    gaps = _gaps(rng, segment, examples)
    rows = np.arange(examples)[:, None]
    inputs = np.zeros((examples, segment.length + 1), np.int64)
    inputs[:, 0 : segment.context : 2] = written_keys
    inputs[:, 1 : segment.context : 2] = written_values
    inputs[rows, segment.context + 2 * gaps] = keys
    labels = np.full_like(inputs, UNLABELLED)
    labels[rows, segment.context + 2 * gaps + 1] = last
    inputs, labels = inputs[:, :-1], labels[:, 1:]
    if filler_seed is not None:
        fillers = filler_tokens(filler_seed, inputs.shape, segment.vocabulary)
        inputs = np.where(inputs == 0, fillers, inputs)
    return inputs.astype(np.int32), labels.astype(np.int32)


def filler_tokens(seed: int, shape: tuple[int, ...], vocabulary: int) -> Int[np.ndarray, "..."]:
    """The tokens that `torch.randint(vocabulary, shape)` gives after `torch.manual_seed(seed)`."""
    numbers = np.random.RandomState(seed)._bit_generator.random_raw(int(np.prod(shape)))
    return (numbers % vocabulary).astype(np.int64).reshape(shape)


def _rows_of_choices(
    rng: np.random.RandomState, tokens: np.ndarray, rows: int, count: int
) -> np.ndarray:
    return np.stack([rng.choice(tokens, replace=False, size=count) for _ in range(rows)])


def _overwrites(
    rng: np.random.RandomState, segment: Zoology, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """New values, and which pairs they go to.

    As in the original, the value left out of the j-th draw is that of pair j, not of the pair that
    is overwritten, so that a new value may be the old one.
    """
    tokens = np.arange(segment.vocabulary // 2, segment.vocabulary)
    updates = [
        [rng.choice(tokens[tokens != row[j]]) for j in range(segment.overwrites)] for row in values
    ]
    places = [
        rng.choice(segment.pairs, size=segment.overwrites, replace=False)
        for _ in range(len(values))
    ]
    return np.array(updates), np.array(places)


def _gaps(rng: np.random.RandomState, segment: Zoology, rows: int) -> np.ndarray:
    space = (segment.length - segment.context) // 2
    weights = segment.power * np.arange(1, space + 1) ** (segment.power - 1)
    weights = weights / weights.sum()
    return np.stack(
        [
            rng.choice(np.arange(space), size=segment.pairs, replace=False, p=weights)
            for _ in range(rows)
        ]
    )
