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

**Over devices** (`kernels.devices`) segments are joined before it is known what enters the first.
Whitened innovations ŵ of the memory I, by R, say what a second element says of the start of the
first, and the element of both is

$$ A = A_1\Psi_2,\quad \eta = \eta_1 + \Lambda_2 A_1^\top,\quad
   J = J_1 + (\hat w A_1^\top)^\top \hat w A_1^\top $$

with Ψ₂, Λ₂ and the belief after it those of P = C₁ and M = b₁. So ⌈log₂ S⌉ rounds find what all
segments up to each do (`running`), and as many what those from each on ask of their start, of maps
(Ψ, Λ, own) that follow each other as Ψ₁Ψ₂ and Λ₁ + Λ₂Ψ₁ᵀ do. In float32 on a CPU (4096 tokens, 32
segments) beliefs that enter segments are as near float64 as when joined in turn; where nothing
fades errors are up to five times larger.

**How many.** A chunk of 64 tokens takes about 12 µs in the elements' pass and 14 in the filter's; a
segment's place in the joining some 20. So rows × S is at most one wave of programs, and S at most
√(N/2) for N chunks, 2 √(N/2) over devices, where twice as many cost a round. S divides N, which
`padded` makes easy; from 3 segments on it pays.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from layers.precision import exact_product

from . import mosaic
from .blocks import Rates
from .covariance import CHUNK, WIDTH
from .elements import Element, elements
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
Squares = Float[Array, "*row key key"]


class Loops(NamedTuple):
    """How a segment passes on a small change of the belief that enters it."""

    closed: Squares  # Ψ
    crossed: Squares  # Λ


class Passage(NamedTuple):
    """What a segment makes of a belief that enters it."""

    covariance: States
    mean: States
    loops: Loops
    told: States  # ŵ, whose products ŵᵀŵ are (I + J P)⁻¹ J


def padded(time: int) -> int:
    """Tokens that a sequence is filled up to: whole chunks, at most 1/32 more of many.

    Many chunks are made a multiple of a power of two, so that several numbers divide them.
    """
    chunks, step = -(-time // CHUNK), 1
    while 64 * step <= chunks:
        step *= 2
    return -(-chunks // step) * step * CHUNK


def most(chunks: int, *, tree: bool = False) -> int:
    """Segments that a sequence is cut into at most, whatever the number of rows.

    Args:
        chunks: of the sequence.
        tree: whether they are joined in one.
    """
    return isqrt(chunks // 2) * (2 if tree else 1)


def count(rows: int, chunks: int, *, tree: bool = False) -> int:
    """Segments that sequences are cut into; 1 where cutting does not pay."""
    bound = min(most(chunks, tree=tree), mosaic.PROCESSORS // max(rows, 1))
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
    found = of_segments(key, value, given, segments, interpret=interpret)
    each = flat(found)
    covariances, means, closed, informed = join_starts(
        each, roots(each.information, interpret), covariance, mean, segments, interpret=interpret
    )
    told = exact_product(informed, found.information[:, :-1])
    return covariances, means, Loops(closed, found.evidence[:, :-1] - told)


def of_segments(
    key: Float[Array, "row time key"],
    value: Float[Array, "row time value"],
    given: Rates,
    segments: int,
    *,
    interpret: bool = False,
) -> Element:
    """The element of each segment, (row, segment, key, key)."""
    parts = jax.tree.map(partial(cut, segments=segments), given)
    found = elements(cut(key, segments), cut(value, segments), parts, interpret=interpret)
    return jax.tree.map(lambda part: part.reshape(-1, segments, *part.shape[1:]), found)


def passed(element: Element, covariance: States, mean: States, interpret: bool = False) -> Passage:
    """What each of some segments makes of the belief that enters it."""
    rows = len(covariance)
    unit = jnp.broadcast_to(jnp.eye(WIDTH, dtype=jnp.float32), (rows, WIDTH, WIDTH))
    nothing, tokens = jnp.zeros_like(unit), _unit_tokens(rows, 1.0)
    root = roots(element.information, interpret)
    heard = filter_blocks(
        root, nothing, nothing, tokens, covariance, unit, save=False, interpret=interpret
    )
    shrunk, posterior = heard["last_mean"], _symmetric(heard["last_covariance"])
    # Products with the same right operand are made together.
    told = jnp.concatenate([mean, element.evidence], axis=2)
    informed = exact_product(told, jnp.concatenate([shrunk, posterior], axis=1))
    left = jnp.concatenate([informed, posterior, shrunk], axis=1)
    moved_mean, moved, closed = jnp.split(exact_product(left, element.moved), 3, axis=1)
    after = exact_product(element.moved.mT, moved) + element.covariance
    loops = Loops(closed, element.evidence - exact_product(informed, element.information))
    whitened = heard["whitened"][:, :, WIDTH:]
    return Passage(_symmetric(after), moved_mean + element.mean, loops, whitened)


def combined(first: Element, second: Element, interpret: bool = False) -> Element:
    """What stretches do in turn, `first` before `second`."""
    after = passed(second, first.covariance, first.mean, interpret)
    told = exact_product(first.moved, after.told.mT)
    return Element(
        exact_product(first.moved, after.loops.closed),
        after.mean,
        after.covariance,
        first.evidence + exact_product(after.loops.crossed, first.moved.mT),
        first.information + exact_product(told, told.mT),
    )


class Asked(NamedTuple):
    """What a stretch asks of the belief that enters it: its loops, and what is its own."""

    closed: Squares  # Ψ
    crossed: Squares  # Λ
    of_mean: Squares
    of_covariance: Squares

    def of_start(self, of_mean: Squares, of_covariance: Squares) -> tuple[Array, Array]:
        """Cotangents of mean and covariance at its start, given those at its end."""
        rows = of_mean.shape[-2]
        faded = exact_product(jnp.concatenate([of_mean, of_covariance], axis=-2), self.closed.mT)
        turned = exact_product(jnp.concatenate([self.crossed.mT, self.closed], axis=-1), faded)
        return faded[..., :rows, :] + self.of_mean, _symmetric(turned) + self.of_covariance

    def before(self, later: "Asked") -> "Asked":
        """What it asks together with the stretch that follows it."""
        return Asked(
            exact_product(self.closed, later.closed),
            self.crossed + exact_product(later.crossed, self.closed.mT),
            *self.of_start(later.of_mean, later.of_covariance),
        )


def running[Tree](
    parts: Tree, combine: Callable[[Tree, Tree], Tree], *, backwards: bool = False
) -> Tree:
    """Each of (row, segment, ...) combined with all of its row before it, in ⌈log₂ S⌉ rounds.

    Args:
        parts: of arrays (row, segment, key, key).
        combine: what a part becomes, (row segment, key, key), of what comes before it and itself.
        backwards: whether the last comes first.
    """
    segments = jax.tree.leaves(parts)[0].shape[1]
    if segments == 1:
        return parts
    step = -1 if backwards else 1
    reaches = [step << power for power in range((segments - 1).bit_length())]
    place = jnp.arange(segments)

    def round_of(parts: Tree, reach: Array) -> tuple[Tree, None]:
        earlier = jax.tree.map(lambda part: jnp.roll(part, reach, axis=1), parts)
        joined = combine(flat(earlier), flat(parts))
        there = (place >= reach) & (place - reach < segments)

        def chosen(joined: Array, part: Array) -> Array:
            return jnp.where(there[:, None, None], joined.reshape(part.shape), part)

        return jax.tree.map(chosen, joined, parts), None

    return lax.scan(round_of, parts, jnp.asarray(reaches))[0]


def flat[Tree](parts: Tree) -> Tree:
    """(row, segment, ...) as (row segment, ...)."""
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), parts)


def roots(information: Squares, interpret: bool = False) -> Squares:
    """R with RᵀR = J, of a positive semi-definite J that rounding may have made less."""
    shape, information = information.shape, information.reshape(-1, WIDTH, WIDTH)
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
    return (found["whitened"][:, :, :WIDTH] * deviation[:, None, :]).reshape(shape)


def begun(
    until: Element,
    covariance: States,
    mean: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[PerSegment, PerSegment]:
    """Covariance and mean that enter each segment, all at once.

    Args:
        until: elements of all segments up to the end of each; more are not read.
        covariance: P before the first token.
        mean: M before the first token.
        segments: how many.
        interpret: whether kernels are simulated on a CPU.
    """
    covariances, means = covariance[:, None], mean[:, None]
    if segments == 1:
        return covariances, means
    earlier = jax.tree.map(lambda part: part[:, : segments - 1], until)

    def repeated(state: Array) -> Array:
        return jnp.repeat(state, segments - 1, axis=0)

    after = passed(flat(earlier), repeated(covariance), repeated(mean), interpret)

    def by_row(first: Array, rest: Array) -> Array:
        rest = rest.reshape(len(first), -1, *rest.shape[1:])
        return jnp.concatenate([first, rest], axis=1)

    return by_row(covariances, after.covariance), by_row(means, after.mean)


def loops_of(
    each: Element, covariances: PerSegment, means: PerSegment, *, interpret: bool = False
) -> Loops:
    """How each segment passes on changes of what enters it.

    Args:
        each: element of each segment; more are not read.
        covariances: that enter each.
        means: likewise.
        interpret: whether kernels are simulated on a CPU.
    """
    each = jax.tree.map(lambda part: part[:, : means.shape[1]], each)
    loops = passed(*flat((each, covariances, means)), interpret).loops
    return jax.tree.map(lambda part: part.reshape(means.shape), loops)


def no_loops(rows: int) -> Loops:
    """Of no segments."""
    none = jnp.zeros((rows, 0, WIDTH, WIDTH), jnp.float32)
    return Loops(none, none)


def filled[Tree](parts: Tree, chunks: int, *, tree: bool = False) -> Tree:
    """Arrays (row, segment, ...), and zeros: as many whatever the number of segments."""
    room = max(1, most(chunks, tree=tree))

    def fill(part: Array) -> Array:
        return jnp.pad(part, [(0, 0), (0, room - part.shape[1]), *[(0, 0)] * (part.ndim - 2)])

    return jax.tree.map(fill, parts)


def ends(
    asked: tuple[Any, ...],
    loops: Loops,
    of_last_mean: States,
    of_last_covariance: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "part key key"], Float[Array, "part key key"]]:
    """Cotangents of mean and covariance after each segment, rows as `cut` makes them.

    Args:
        asked: keys, queries, cotangents, numbers and what `local.local` found, for `sweep`.
        loops: of every segment but the last; more are not read.
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
    return join_ends(*own, *loops, *lasts, segments, interpret=interpret)


def asked_from(
    asked: tuple[Any, ...], loops: Loops, segments: int, *, interpret: bool = False
) -> Asked:
    """What each segment, and those after it, ask of the belief that enters it, (row, segment, ...).

    Args:
        asked: as for `ends`.
        loops: of every segment; more are not read.
        segments: how many.
        interpret: whether kernels are simulated on a CPU.
    """
    nothing = jnp.zeros((len(asked[0]), WIDTH, WIDTH), jnp.float32)
    own = sweep(*asked, of_last_mean=nothing, of_last_covariance=nothing, interpret=interpret)
    of_mean, of_covariance = (state.reshape(-1, segments, WIDTH, WIDTH) for state in own)
    closed, crossed = (loop[:, :segments] for loop in loops)
    each = Asked(closed, crossed, of_mean, of_covariance)
    return running(each, lambda later, part: part.before(later), backwards=True)


def ends_from(
    asked: Asked, of_last_mean: States, of_last_covariance: States, segments: int
) -> tuple[Float[Array, "part key key"], Float[Array, "part key key"]]:
    """As `ends`, of what `asked_from` has found, all at once."""
    lasts = of_last_mean[:, None], of_last_covariance[:, None]
    later = jax.tree.map(lambda part: part[:, 1:segments], asked)
    found = zip(later.of_start(*lasts), lasts, strict=True)
    of_mean, of_covariance = flat(tuple(jnp.concatenate(part, axis=1) for part in found))
    return of_mean, of_covariance


def _unit_tokens(rows: int, noise: float) -> Rates:
    """Rates of 64 tokens that neither decay nor drift."""
    one = jnp.ones((rows, CHUNK), jnp.float32)
    lower = jnp.tril(jnp.ones((BLOCK, BLOCK), jnp.float32))
    ratios = jnp.tile(lower, (rows, CHUNK // BLOCK, 1))
    return Rates(noise * one, one, 0 * one, one, one, ratios)


def _symmetric(square: Array) -> Array:
    return (square + square.mT) / 2
