"""What kernels of the gradient know of a chunk: its numbers, its matrices and their products.

In the notation of `kernels.reverse`. Two warpgroups share the columns of every matrix (`Share`),
whole matrices lie in shared memory in pieces (`Pieces`, `Memory`).
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, SAVED_PIECES, WIDTH
from .mosaic import COLUMNS, ROWS, along_columns, along_rows, pieces

PIECES = SAVED_PIECES
SHARES = 2
"""Warpgroups that share the columns of a chunk's matrices."""
SQUARE = (CHUNK, WIDTH)


class Numbers(NamedTuple):
    """Numbers a token that the kernels take together, (row, time).

    Where rates are per key `alpha` is α_C of each key, and no other decay is read.
    """

    total: Array  # log decay since the chunk's start
    document: Array  # how many documents have started since
    alpha: Array
    drift: Array
    end: Array
    of_variance: Array
    of_evidence: Array
    inverse_deviation: Array
    faded: Array | None = None  # log λ of a restoration, summed since the chunk's start

    def by_chunk(self) -> Float[Array, "row chunk number token"]:
        stacked = jnp.stack([part for part in self if part is not None], axis=1)
        cut = stacked.reshape(*stacked.shape[:2], -1, CHUNK)
        return jnp.swapaxes(cut, 1, 2)


def numbers_of(ref) -> Numbers:
    """References to each of a chunk's numbers."""
    return Numbers(*(ref.at[index] for index in range(ref.shape[0])))


def restores(numbers: Float[Array, "row chunk number token"]) -> bool:
    """Whether covariances are restored, from how many numbers a token has."""
    return numbers.shape[2] == len(Numbers._fields)


class Share:
    """A warpgroup's share of the columns of a chunk's matrices: indices, vectors, ratios."""

    def __init__(self, which, width, interpret, rows=CHUNK):
        self.shape = (rows, width)
        self.first = which * width
        self.columns = pl.ds(self.first, width)
        self.i = mosaic.index(self.shape, 0)
        self.j = mosaic.index(self.shape, 1) + self.first
        self.interpret = interpret
        self.multiply = partial(mosaic.product, self.shape, interpret=interpret)

    def along(self, ref):
        """A number a token, all along its row."""
        return along_rows(mosaic.load(ref, ROWS), self.shape)

    def across(self, ref):
        """A number a token, all along its column."""
        return along_columns(mosaic.load(ref.at[self.columns], COLUMNS), self.shape)

    def ratios(self, numbers):
        same = self.along(numbers.document) == self.across(numbers.document)
        allowed = jnp.logical_and(self.i >= self.j, same)
        # The exponent is at most 0 where it counts.
        exponent = self.along(numbers.total) - self.across(numbers.total)
        ratio = jnp.exp(jnp.minimum(exponent, 0))
        return jnp.where(allowed, ratio, jnp.zeros_like(ratio))

    def lower(self, square):
        return jnp.where(self.i >= self.j, square, jnp.zeros_like(square))

    def diagonal(self, square):
        return jnp.where(self.i == self.j, square, jnp.zeros_like(square))

    def halved(self, square):
        return self.lower(jnp.where(self.i == self.j, square * 0.5, square))

    def halved_above(self, square):
        halved = jnp.where(self.i == self.j, square * 0.5, square)
        return jnp.where(self.i <= self.j, halved, jnp.zeros_like(square))

    def lasting(self, numbers):
        """What restoration keeps of the covariance between two tokens, the later in a row."""
        between = self.along(numbers.faded) - self.across(numbers.faded)
        return jnp.exp(jnp.minimum(between, 0))

    def since(self, numbers):
        """Decay of the covariance since the chunk's start."""
        fade = self.along(numbers.alpha)
        fade = fade * fade
        return fade if numbers.faded is None else fade * jnp.exp(self.along(numbers.faded))

    def until(self, numbers):
        """What restoration keeps of the covariance from each token to the chunk's end."""
        return jnp.exp(numbers.faded[CHUNK - 1] - self.along(numbers.faded))

    def load(self, ref):
        return mosaic.load(ref.at[:, self.columns]).astype(jnp.float32)

    def put(self, ref, matrix):
        for piece, part in enumerate(pieces(matrix, PIECES)):
            ref.at[piece, :, self.columns][...] = part

    def plain(self, ref):
        """Own share of what pieces sum to."""
        return sum(self.load(ref.at[piece]) for piece in range(ref.shape[0]))

    def times(self, *factors):
        """Own share of a sum of products, each of (left, right) whose pieces are whole."""
        return self.multiply(self._terms(factors))

    def beside(self, work, *factors):
        """`times`, and what is done meanwhile."""
        return mosaic.product_beside(self.shape, self._terms(factors), work, self.interpret)

    def within(self, between, left, right):
        """Own share of a product, of some of the indices that it sums over."""
        every = range(PIECES)
        lefts = [left.ref.at[piece, :, between] for piece in every]
        rights = [right.ref.at[piece, between, self.columns] for piece in every]
        return self.multiply(mosaic.pairs(lefts, rights, PIECES))

    def _terms(self, factors):
        terms = []
        for left, right in factors:
            terms += mosaic.pairs(left.left(), right.right(self.columns), PIECES)
        return terms


class Pieces:
    """A matrix in shared memory, or its transpose."""

    def __init__(self, ref, transposed=False):
        self.ref, self.transposed = ref, transposed

    @property
    def T(self):
        return Pieces(self.ref, not self.transposed)

    def left(self):
        parts = [self.ref.at[piece] for piece in range(self.ref.shape[0])]
        return [part.transpose((1, 0)) for part in parts] if self.transposed else parts

    def right(self, columns):
        if self.transposed:
            every = range(self.ref.shape[0])
            return [self.ref.at[piece, columns].transpose((1, 0)) for piece in every]
        return [self.ref.at[piece, :, columns] for piece in range(self.ref.shape[0])]


def opaque_zero(vectors, slot):
    """0, which the compiler cannot know.

    Buffers are indexed by it: otherwise the compiler computes every operand's descriptor once,
    before the loop over chunks, and keeps hundreds of them in local memory.
    """
    negative = vectors[slot, Numbers._fields.index("alpha"), CHUNK - 1] < 0
    return negative.astype(jnp.int32)


TURNING = {"weights": "of_means", "spreads": "of_covariances"}
"""B and Θ of the next chunk are copied to where M̄ and P̄ of this one have been read."""


class Memory:
    """Shared memory of a recursion through chunks, by name, and the copies to it.

    A few matrices are copied at a time: the copy engine takes some four, and who starts more stands
    still meanwhile.
    """

    @staticmethod
    def scratch(depth, numbers, held, arrivals) -> dict[str, Any]:
        """For keys and queries of `depth` pieces, further operands and groups of copies."""
        form = mosaic.operands_of(WIDTH // SHARES)

        def operand(depth, turns=1):
            return mosaic.SMEM((turns, depth, *SQUARE), jnp.bfloat16, transforms=form)

        return {
            **dict.fromkeys(("keys", "queries"), operand(depth)),
            **dict.fromkeys(held, operand(PIECES)),
            **dict.fromkeys(TURNING, operand(PIECES, turns=2)),
            "vectors": mosaic.SMEM((2, *numbers.shape[2:]), jnp.float32),
            "numbered": mosaic.barrier(num_arrivals=1, num_barriers=2),
            "handed": mosaic.barrier(num_arrivals=len(TURNING) * PIECES),
            **{name: mosaic.barrier(num_arrivals=number) for name, number in arrivals.items()},
            "met": mosaic.barrier(num_arrivals=SHARES),
        }

    def __init__(self, place, interpret):
        names = tuple(place)
        self.refs = place
        self.held = names[: names.index(next(iter(TURNING)))]
        self.vectors = self.refs["vectors"]
        self.interpret = interpret

    def find(self, slot):
        """Operands, whose addresses the compiler finds anew: kept, they would be spilled."""
        only = mosaic.uniform(opaque_zero(self.vectors, slot), self.interpret)
        found = {name: Pieces(self.refs[name].at[only]) for name in self.held}
        for name, other in TURNING.items():
            found[name] = Pieces(self.refs[name].at[slot + only])
            found[other] = Pieces(self.refs[name].at[1 - slot - only])
        return SimpleNamespace(**found)

    def next_phase(self, slot):
        """Operands, once all warpgroups have met."""
        found = self.find(slot)
        self.meet()
        return found

    def meet(self):
        mosaic.meet(self.refs["met"], self.interpret)

    def bring(self, when, group, *copies):
        """Start a group's copies of matrices' pieces, (from, to)."""

        @pl.when(when)
        def _():
            for source, spot in copies:
                for piece in range(spot.shape[0]):
                    mosaic.copy_in(source.at[piece], spot.at[piece], self.refs[group])

    def hand(self, when, slot, *sources):
        """Start copies of B and Θ."""
        spots = (self.refs[name].at[slot] for name in TURNING)
        self.bring(when, "handed", *zip(sources, spots, strict=True))

    def number(self, when, slot, source):
        @pl.when(when)
        def _():
            mosaic.copy_in(source, self.vectors.at[slot], self.refs["numbered"].at[slot])

    def foresee(self, when, *refs):
        """Bring what is loaded to registers later nearer."""

        @pl.when(when)
        def _():
            for ref in refs:
                mosaic.prefetch(ref, self.interpret)

    def wait(self, group):
        mosaic.barrier_wait(self.refs[group])

    def enter(self, slot, share):
        """A chunk's numbers, once they are there; a share of its matrices; and operands.

        The share's indices are new too: what is known of diagonals would be kept from before the
        loop.
        """
        mosaic.barrier_wait(self.refs["numbered"].at[slot])
        here = Share(share + opaque_zero(self.vectors, slot), WIDTH // SHARES, self.interpret)
        return numbers_of(self.vectors.at[slot]), here, self.find(slot)
