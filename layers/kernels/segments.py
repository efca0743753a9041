r"""A few long sequences on a whole card: segments of a sequence at once, exactly.

One program a head leaves most multiprocessors idle where heads are few. A sequence is then cut into
S segments, about as many as fill the card:

1. `kernels.elements` finds what each segment does to any belief that enters it, all side by side;
2. `starts` goes through the S elements in turn, and so finds what enters each segment;
3. `kernels.forward` filters all segments side by side from there.

**Joining.** An element says of its start what 64 values with keys R and noise 1 would, where
RᵀR = J. So what filters tokens finds what the belief that enters becomes: from mean I and P, over
64 such values of 0, come Υ = (I + J P)⁻¹ and P⁺ = P Υ, and M⁺ = M Υ + η P⁺. No matrix is inverted.
`kernels.joining` does so for all segments of a head in one program. R comes from the filter's
kernel too (`roots`): from covariance J, scaled to a diagonal of 1, it eliminates unit keys, and the
whitened covariances that it leaves are rows of R. Their noise
δ = 1e-5 keeps pivots positive that rounding might not (J's is some 1e-6), and takes from the
information of a direction at most δ of that of the coordinates. Where the memory drifts or decays
so little information lasts that starts have the digits of a filter token by token, or more; where
nothing does they have fewer, and a sequence that is given neither drift nor decay stays whole.

**Gradient.** The closed loop of a segment and its derivative by P,

$$ \Psi = \Upsilon A,\quad \Lambda = \eta - M^+ J, $$

are kept, with which cotangents of what entered a segment and of what left it are

$$ \bar M = \bar M'\Psi^\top + \text{own},\quad
   \bar P = \mathrm{sym}(\Psi\bar P'\Psi^\top + \Lambda^\top\bar M'\Psi^\top) + \text{own}. $$

`kernels.sweep` finds what is a segment's own, `ends` goes through the segments from the last to the
first, and `reverse.recur` passes all segments side by side from there.

**How many.** A chunk of 64 tokens takes about 12 µs in the elements' pass and 14 in the filter's; a
segment's place in the joining some 20. So rows × S is at most one wave of programs, and S at most
√(N/2) for N chunks. S divides N, which `padded` makes easy; from 3 segments on it pays.
"""

from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.precision import exact_product

from . import reverse
from .blocks import Rates
from .covariance import CHUNK, WIDTH
from .elements import elements
from .forward import filter_blocks
from .joining import join_ends, join_starts
from .mosaic import BLOCK
from .sweep import sweep

FEWEST = 3
"""Segments from which cutting pays."""
ROOT_NOISE = 1e-5
LEAST_INFORMATION = 1e-30
"""Below it information is none: its entries near the smallest numbers are no definite matrix."""

States = Float[Array, "row key key"]
PerSegment = Float[Array, "row segment key key"]


class Loops(NamedTuple):
    """How a segment passes on a small change of the belief that enters it."""

    closed: PerSegment  # Ψ
    crossed: PerSegment  # Λ


def padded(time: int) -> int:
    """Tokens that a sequence is filled up to: whole chunks, at most 1/32 more of many.

    Many chunks are made a multiple of a power of two, so that several numbers divide them.
    """
    chunks, step = -(-time // CHUNK), 1
    while 64 * step <= chunks:
        step *= 2
    return -(-chunks // step) * step * CHUNK


def most(chunks: int) -> int:
    """Segments that a sequence is cut into at most, whatever the number of rows."""
    return isqrt(chunks // 2)


def count(rows: int, chunks: int) -> int:
    """Segments that sequences are cut into; 1 where cutting does not pay."""
    bound = min(most(chunks), reverse.PROCESSORS // max(rows, 1))
    found = max((n for n in range(1, bound + 1) if chunks % n == 0), default=1)
    return found if found >= FEWEST else 1


def cut(array: Array, segments: int) -> Array:
    """(row, time, ...) as (row segment, time of a segment, ...)."""
    rows, time = array.shape[:2]
    return array.reshape(rows * segments, time // segments, *array.shape[2:])


def join(array: Array, segments: int) -> Array:
    """The inverse of `cut`."""
    rows, time = array.shape[:2]
    return array.reshape(rows // segments, time * segments, *array.shape[2:])


def starts(
    key: Float[Array, "row time key"],
    value: Float[Array, "row time value"],
    given: Rates,
    covariance: States,
    mean: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[PerSegment, PerSegment, Loops]:
    """Covariance and mean that enter each segment, and how segments but the last pass on changes.

    Args:
        key: of whole sequences, as are values.
        value: what is written.
        given: rates, of whole sequences, that restore nothing.
        covariance: P before the first token.
        mean: M before the first token.
        segments: how many.
        interpret: whether kernels are simulated on a CPU.
    """
    parts = jax.tree.map(partial(cut, segments=segments), given)
    found = elements(cut(key, segments), cut(value, segments), parts, interpret=interpret)

    root = roots(found.information, interpret)
    covariances, means, closed, informed = join_starts(
        found, root, covariance, mean, segments, interpret=interpret
    )

    def first(array: Array) -> Array:
        return array.reshape(-1, segments, *array.shape[1:])[:, :-1]

    crossed = first(found.evidence) - exact_product(informed, first(found.information))
    return covariances, means, Loops(closed, crossed)


def roots(information: States, interpret: bool = False) -> States:
    """R with RᵀR = J, of a positive semi-definite J that rounding may have made less."""
    information = _symmetric(information)
    variance = jnp.diagonal(information, axis1=1, axis2=2)
    deviation = jnp.sqrt(jnp.where(variance < LEAST_INFORMATION, 0, variance))
    scale = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1), 0)
    scaled = information * scale[:, :, None] * scale[:, None, :]
    rows = len(information)
    unit = jnp.broadcast_to(jnp.eye(WIDTH, dtype=jnp.bfloat16), (rows, WIDTH, WIDTH))
    nothing, tokens = jnp.zeros_like(unit), _unit_tokens(rows, ROOT_NOISE)
    mean = jnp.zeros_like(scaled)
    found = filter_blocks(
        unit, nothing, nothing, tokens, scaled, mean, save=False, interpret=interpret
    )
    return found["whitened"][:, :, :WIDTH] * deviation[:, None, :]


def filled(loops: Loops | None, rows: int, chunks: int) -> Float[Array, "row most two key key"]:
    """Loops, and zeros in the place of more: as many whatever the number of segments."""
    room = rows, most(chunks), len(Loops._fields), WIDTH, WIDTH
    if loops is None:
        return jnp.zeros(room)
    stacked = jnp.stack(loops, axis=2)
    return jnp.pad(stacked, [(0, 0), (0, most(chunks) - stacked.shape[1]), *[(0, 0)] * 3])


def ends(
    asked: tuple[Any, ...],
    loops: Float[Array, "row most two key key"],
    of_last_mean: States,
    of_last_covariance: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "part key key"], Float[Array, "part key key"]]:
    """Cotangents of mean and covariance after each segment, rows as `cut` makes them.

    Args:
        asked: keys, queries, cotangents, numbers and what `reverse.local` found, for `sweep`.
        loops: as `filled`.
        of_last_mean: cotangent of the mean after the last token.
        of_last_covariance: likewise.
        segments: how many.
        interpret: whether kernels are simulated on a CPU.
    """
    # What is asked of the last segment's end, and nothing of the others'.
    before = [(0, 0), (segments - 1, 0), (0, 0), (0, 0)]
    lasts = of_last_mean, of_last_covariance
    alone = (jnp.pad(last[:, None], before).reshape(-1, WIDTH, WIDTH) for last in lasts)
    own = sweep(*asked, *alone, interpret=interpret)
    return join_ends(*own, loops, *lasts, segments, interpret=interpret)


def _unit_tokens(rows: int, noise: float) -> Rates:
    """Rates of 64 tokens that neither decay nor drift."""
    one = jnp.ones((rows, CHUNK))
    ratios = jnp.tile(jnp.tril(jnp.ones((BLOCK, BLOCK))), (rows, CHUNK // BLOCK, 1))
    return Rates(noise * one, one, 0 * one, one, one, ratios)


def _symmetric(square: Array) -> Array:
    return (square + square.mT) / 2
