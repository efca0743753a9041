"""What a training run is shown, step by step, and what is asked of it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from .mqar import UNLABELLED
from .tasks.catalogue import Batch, Rows, draw
from .tasks.zoology import Zoology

_SEEDS = 2**31


@dataclass(frozen=True)
class Segment:
    """So many examples of one kind of rows."""

    rows: Rows
    examples: int


@dataclass(frozen=True)
class Questions:
    """A batch as a model takes it.

    Args:
        inputs: of every row.
        places: where each row is asked.
        answers: what is right there.
        weights: 0 where a row has fewer questions than others, else 1.
    """

    inputs: Int[np.ndarray, "row position ..."]
    places: Int[np.ndarray, "row query"]
    answers: Int[np.ndarray, "row query"]
    weights: Float[np.ndarray, "row query"]

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.inputs.shape[0] * self.inputs.shape[1]


@dataclass(frozen=True)
class Course:
    """What is shown in training, and in which order.

    Args:
        segments: kinds of rows.
        batch: rows of a step.
        steps: in all, where batches are drawn on the fly, each of one segment at random.
        epochs: how often all segments are shown in their order, each drawn once; 0 for on the fly.
        seed: of all draws.
        filler: whether Zoology's fillers are random tokens.
    """

    segments: tuple[Segment, ...]
    batch: int
    steps: int = 0
    epochs: int = 0
    seed: int = 0
    filler: bool = True

    @property
    def length(self) -> int:
        """Steps in all."""
        return self.epochs * self._per_epoch if self.epochs else self.steps

    @property
    def _per_epoch(self) -> int:
        return sum(-(-segment.examples // self.batch) for segment in self.segments)

    def progress(self, step: int) -> float:
        """How far the course is, as its learning rate sees it: by epochs where it has them."""
        return step // self._per_epoch / self.epochs if self.epochs else step / self.steps

    def questions(self, step: int) -> Questions:
        """The batch of a step, the same whenever it is asked for."""
        if not self.epochs:
            rng = np.random.default_rng([self.seed, step])
            segment = self.segments[int(rng.integers(len(self.segments)))]
            seed, filler_seed = (int(number) for number in rng.integers(_SEEDS, size=2))
            return _shown(segment.rows, self.batch, seed, filler_seed if self.filler else None)
        number, place = self._place(step)
        segment, seed = self.segments[number], int(self._seeds(0)[0][number])
        drawn = _segment(segment, seed, self.filler)
        rows = slice(place * self.batch, (place + 1) * self.batch)
        return Questions(
            drawn.inputs[rows], drawn.places[rows], drawn.answers[rows], drawn.weights[rows]
        )

    def alike(self, step: int) -> int:
        """How many steps from this one on show rows of the same kind; 1 where drawn on the fly."""
        if not self.epochs:
            return 1
        number, place = self._place(step)
        return -(-self.segments[number].examples // self.batch) - place

    def most_asked(self, length: int) -> int:
        """Questions of the row that is asked most among Zoology's of a length; 0 for others."""
        laws = [segment.rows for segment in self.segments]
        asked = [rows.pairs for rows in laws if isinstance(rows, Zoology) and rows.length == length]
        return max(asked, default=0)

    def test_seeds(self, count: int) -> list[int]:
        """Seeds of so many kinds of test rows, drawn as upstream draws them for its data."""
        return self._seeds(count)[1].tolist()

    def _place(self, step: int) -> tuple[int, int]:
        """Which segment a step is in, and which of its batches it shows."""
        place = step % self._per_epoch
        for number, segment in enumerate(self.segments):
            count = -(-segment.examples // self.batch)
            if place < count:
                return number, place
            place -= count
        raise AssertionError("a place beyond the epoch")

    def _seeds(self, tests: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.RandomState(self.seed)
        training = rng.randint(0, _SEEDS, size=len(self.segments), dtype=np.int64)
        return training, rng.randint(_SEEDS, 2 * _SEEDS, size=tests, dtype=np.int64)


@lru_cache(maxsize=8)  # every epoch, and every plan with the same course, shows the same rows
def _segment(segment: Segment, seed: int, filler: bool) -> Questions:
    return _shown(segment.rows, segment.examples, seed, seed if filler else None)


def _shown(rows: Rows, examples: int, seed: int, filler_seed: int | None) -> Questions:
    """Questions about what rows decide: the next token at every position drowns it in chance."""
    filler_seed = filler_seed if isinstance(rows, Zoology) else None
    return questions(draw(rows, examples, seed, filler_seed=filler_seed), rows.most_asked)


def held_out(rows: Rows, examples: int, seed: int, filler: bool = True) -> Questions:
    """Questions about rows that training does not draw."""
    filler_seed = seed + 1 if filler and isinstance(rows, Zoology) else None
    return questions(draw(rows, examples, seed, filler_seed=filler_seed), rows.most_asked)


def questions(batch: Batch, most: int) -> Questions:
    """Gather what is asked, at most so much of a row; what a row lacks has weight 0."""
    asked = batch.labels != UNLABELLED
    places = np.argsort(~asked, axis=1, kind="stable")[:, :most]
    weights = np.take_along_axis(asked, places, axis=1)
    answers = np.where(weights, np.take_along_axis(batch.labels, places, axis=1), 0)
    return Questions(
        batch.inputs,
        places.astype(np.int32),
        answers.astype(np.int32),
        weights.astype(np.float32),
    )
