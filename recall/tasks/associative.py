r"""Associative recall of continuous keys and values, with or without collisions.

A row writes K pairs, P times over in a new order each time, and then asks for every key once.
Position by position it holds the number of a key and of the value written with it, -1 where one is
asked for; the label of a question is the value last written. Keys and values are unit vectors that
`directions` gives for their numbers; the keys of one table have cosine c with each other,

$$ k_i = \sqrt{c}\,e + \sqrt{1 - c}\,u_i \quad (u_i \perp e \text{ uniform on the sphere}). $$

With `revisions`, so many keys are then written once more, each with another value.

Source: the layer-level task of HazyResearch/zoology, `stacked_mqar.py`, which has c = 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from design_models import ModelError

from ..mqar import UNLABELLED

ASKED = -1
"""In place of a value's number where one is asked for."""


@dataclass(frozen=True)
class AssociativeRecall:
    """Rows of pairs of vectors.

    Args:
        codes: how many keys there are, and how many values.
        pairs: K, pairs of a row.
        passes: P, how often each pair is written.
        revisions: keys that are written once more with another value.
        overlap: c, cosine between any two keys.
    """

    codes: int = 256
    pairs: int = 8
    passes: int = 1
    revisions: int = 0
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.codes or self.codes < 2:
            raise ModelError(
                f"`pairs` is {self.pairs} and `codes` {self.codes}; a row takes from 1 to all of "
                "the codes, of which there are at least 2."
            )
        if self.passes < 1:
            raise ModelError(f"`passes` is {self.passes}; pairs are written at least once.")
        if not 0 <= self.revisions <= self.pairs:
            raise ModelError(
                f"`revisions` is {self.revisions}; between 0 and all {self.pairs} keys are revised."
            )
        if not 0 <= self.overlap < 1:
            raise ModelError(f"`overlap` is {self.overlap}; a cosine from 0 and below 1 is meant.")

    @property
    def most_asked(self) -> int:
        """Questions that a row can hold."""
        return self.pairs

    @property
    def length(self) -> int:
        """Positions of a row."""
        return (self.passes + 1) * self.pairs + self.revisions


def draw(
    task: AssociativeRecall, examples: int, seed: int
) -> tuple[Int[np.ndarray, "row position 2"], Int[np.ndarray, "row position"]]:
    """Draw rows of (key, value) numbers, and labels: -100 where nothing is asked."""
    rng = np.random.default_rng(seed)
    rows = np.arange(examples)[:, None]

    def some(count: int, of: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(of), (examples, 1)), axis=1)[:, :count]

    keys, values = some(task.pairs, task.codes), some(task.pairs, task.codes)
    orders = [some(task.pairs, task.pairs) for _ in range(task.passes)]
    written = [np.stack([keys[rows, order], values[rows, order]], axis=-1) for order in orders]
    if task.revisions:
        revised = some(task.revisions, task.pairs)
        other = rng.integers(1, task.codes, revised.shape)  # so that the value is another one
        values = values.copy()
        values[rows, revised] = (values[rows, revised] + other) % task.codes
        written.append(np.stack([keys[rows, revised], values[rows, revised]], axis=-1))
    order = some(task.pairs, task.pairs)
    asked = keys[rows, order]
    questions = np.stack([asked, np.full_like(asked, ASKED)], axis=-1)
    inputs = np.concatenate([*written, questions], axis=1)
    labels = np.full(inputs.shape[:2], UNLABELLED)
    labels[:, -task.pairs :] = values[rows, order]
    return inputs.astype(np.int32), labels.astype(np.int32)


def directions(
    codes: int, width: int, overlap: float, seed: int
) -> Float[np.ndarray, "code width"]:
    """Unit vectors of cosine `overlap` with each other, on average over the sphere."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(codes, width))
    if not overlap:
        return own / np.linalg.norm(own, axis=1, keepdims=True)
    common = rng.normal(size=width)
    common /= np.linalg.norm(common)
    own -= np.outer(own @ common, common)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return np.sqrt(overlap) * common + np.sqrt(1 - overlap) * own
