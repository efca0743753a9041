r"""Segments of a sequence in turn, one program a head (`kernels.segments`).

`join_starts` goes through elements (A, b, C, η, J) from the first to the last but one, with P and M
in registers. 64 pseudo-tokens, whose keys are a root of J, turn P into P⁺ and I into Υ, as tokens
are filtered (`covariance.narrow_block`), without decay or drift and with noise 1. Then

$$ M^+ = M \Upsilon + \eta P^+,\quad M' = M^+ A + b,\quad P' = A^\top P^+ A + C,\quad
   \Psi = \Upsilon A. $$

`join_ends` goes back, with M̄ and P̄ in registers:

$$ \bar M = \bar M'\Psi^\top + \text{own},\quad
   \bar P = \Psi\bar P'\Psi^\top + \mathrm{sym}(\Lambda^\top\bar M'\Psi^\top) + \text{own}. $$

**Layout.** Warpgroup 0 holds the covariance, warpgroup 1 the mean. A segment is four blocks and
three products in turn in the one, two products in the other. What the next segment needs is copied
while the other half of this one is at work.
"""

from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .covariance import CHUNK, COVARIANCE_PIECES, WIDTH, hidden_zero, identity, narrow_block
from .elements import SQUARE, VALUES, Element, innovate, update
from .forward import split
from .matrices import PIECES
from .mosaic import BLOCK, ROWS, pairs, pieces

States = Float[Array, "row key key"]
Parts = Float[Array, "part key key"]
PerSegment = Float[Array, "row segment key key"]
Passed = Float[Array, "row passed key key"]


def join_starts(
    found: Element,
    root: Parts,
    covariance: States,
    mean: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[PerSegment, PerSegment, Passed, Passed]:
    """Covariance and mean that enter each segment; Ψ and M⁺ of all but the last.

    Args:
        found: elements of every row's segments, rows one after the other.
        root: R with RᵀR = J, of each.
        covariance: P before the first token of each row.
        mean: M before it.
        segments: how many a row has.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, f32 = len(covariance), jnp.float32
    count = COVARIANCE_PIECES
    shared = mosaic.SMEM
    whole = shared((1, count, *SQUARE), jnp.bfloat16, transforms=mosaic.operands_of(WIDTH))
    numbers, columns = shared((1, CHUNK), f32), shared((BLOCK, 2 * WIDTH + 4), f32)
    pieced = shared((1, count, WIDTH, BLOCK), jnp.bfloat16, transforms=mosaic.THIN)
    scratch = {
        "keys": shared((1, count, CHUNK, WIDTH), jnp.bfloat16, transforms=mosaic.THIN),
        "keys_plain": shared((1, CHUNK, WIDTH), f32),
        **dict.fromkeys(("transition", "shrunk", "posterior", "crossed"), whole),
        **dict.fromkeys(("noises", "alphas", "drifts", "ends", "decays", "deviations"), numbers),
        "ratios": shared((1, CHUNK, BLOCK), f32),
        **dict.fromkeys(("columns", "whitened"), columns),
        "joint": shared((2, CHUNK, BLOCK + 4), f32),
        **dict.fromkeys(("drawn", "moved"), pieced),
        "told": mosaic.barrier(num_arrivals=count + 1),
        "arrived": mosaic.barrier(num_arrivals=count),
        **dict.fromkeys(
            ("innovations_ready", "joint_ready", "elimination_ready"),
            mosaic.barrier(num_arrivals=1),
        ),
        "met": mosaic.barrier(num_arrivals=2),
    }
    out = {
        **dict.fromkeys(("covariances", "means"), ((rows, segments, *SQUARE), f32)),
        **dict.fromkeys(("closed", "informed"), ((rows, segments - 1, *SQUARE), f32)),
    }
    run = mosaic.kernel(
        partial(_starts, segments=segments),
        out,
        {"row": rows},
        scratch,
        2,
        interpret,
    )
    given = split(root, count), root, split(found.moved, count)
    states = found.mean, found.covariance, found.evidence, covariance, mean
    got = run(*given, *states)
    return got["covariances"], got["means"], got["closed"], got["informed"]


def _starts(*inputs, out, place, segments, interpret):
    keys, keys_plain, transition, added_mean, added, evidence, first, first_mean = inputs
    out = SimpleNamespace(**out)
    here = SimpleNamespace(kept=None, faded=None, interpret=interpret, **place)
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    multiply = partial(mosaic.product, SQUARE, interpret=interpret)
    every = range(COVARIANCE_PIECES)

    def parts_of(place):
        only = hidden_zero(here, 0, 0)
        return [place.at[only, piece] for piece in every]

    def bring(source, target, c, barrier):
        for piece in every:
            mosaic.copy_in(source.at[row * segments + c, piece], target.at[piece], barrier)

    def tell(c):
        bring(keys, here.keys.at[0], c, here.told)
        mosaic.copy_in(keys_plain.at[row * segments + c], here.keys_plain.at[0], here.told)

    def put(place, state):
        parts = pieces(state, COVARIANCE_PIECES)
        for target, part in zip(parts_of(place), parts, strict=True):
            target[...] = part
        return parts

    def times(left, right):
        return pairs(left, right, COVARIANCE_PIECES)

    def through_blocks(block, state):
        return lax.fori_loop(0, CHUNK // BLOCK, lambda i, state: block(i * BLOCK, state), state)

    @pl.when(warpgroup == 0)
    def _covariance():
        tell(0)
        bring(transition, here.transition.at[0], 0, here.arrived)
        one = mosaic.zeros((CHUNK,), ROWS) + 1
        for ref in (here.noises, here.alphas, here.ends, here.decays):
            ref.at[0][...] = one
        here.drifts.at[0][...] = mosaic.zeros((CHUNK,), ROWS)
        here.ratios.at[0][...] = mosaic.zeros((CHUNK, BLOCK)) + 1  # below the diagonal all count
        mosaic.meet(here.met, interpret)
        block = narrow_block(reads=False)

        def segment(c, covariance):
            mosaic.barrier_wait(here.told)
            start = (covariance,)
            (posterior,) = through_blocks(lambda start, state: block(here, 0, start, state), start)
            left = put(here.posterior, posterior)
            mosaic.barrier_wait(here.arrived)
            put(here.crossed, multiply(times(left, parts_of(here.transition))))
            mosaic.meet(here.met, interpret)
            more = c + 2 < segments

            @pl.when(more)
            def _():
                tell(c + 1)

            turned = [part.transpose((1, 0)) for part in parts_of(here.transition)]
            after = multiply(times(turned, parts_of(here.crossed)))
            after = after + mosaic.load(added.at[row * segments + c])
            out.covariances.at[row, c + 1][...] = after
            mosaic.meet(here.met, interpret)

            @pl.when(more)
            def _():
                bring(transition, here.transition.at[0], c + 1, here.arrived)

            return after

        start = mosaic.load(first.at[row])
        out.covariances.at[row, 0][...] = start
        lax.fori_loop(0, segments - 1, segment, start)

    @pl.when(warpgroup == 1)
    def _mean():
        mosaic.meet(here.met, interpret)

        def block(start, shrunk):
            tokens = pl.ds(start, BLOCK)
            innovate(here, shrunk, COVARIANCE_PIECES, 0, tokens, VALUES)
            mosaic.barrier_arrive(here.innovations_ready)
            mosaic.barrier_wait(here.joint_ready)
            mosaic.barrier_wait(here.elimination_ready)
            surprise = mosaic.load_transposed(here.whitened.at[:, VALUES])
            return update(here, shrunk, surprise, COVARIANCE_PIECES, 0, start)

        def segment(c, mean):
            mosaic.barrier_wait(here.told)
            left = put(here.shrunk, through_blocks(block, identity()))
            mosaic.barrier_wait(here.arrived)
            out.closed.at[row, c][...] = multiply(times(left, parts_of(here.transition)))
            mosaic.meet(here.met, interpret)
            told = pieces(mosaic.load(evidence.at[row * segments + c]), COVARIANCE_PIECES)
            terms = times(pieces(mean, COVARIANCE_PIECES), parts_of(here.shrunk))
            informed = multiply(terms + times(told, parts_of(here.posterior)))
            out.informed.at[row, c][...] = informed
            after = multiply(times(pieces(informed, COVARIANCE_PIECES), parts_of(here.transition)))
            after = after + mosaic.load(added_mean.at[row * segments + c])
            out.means.at[row, c + 1][...] = after
            mosaic.meet(here.met, interpret)
            return after

        start = mosaic.load(first_mean.at[row])
        out.means.at[row, 0][...] = start
        lax.fori_loop(0, segments - 1, segment, start)


def join_ends(
    own_mean: Parts,
    own_covariance: Parts,
    closed: PerSegment,
    crossed: PerSegment,
    of_last_mean: States,
    of_last_covariance: States,
    segments: int,
    *,
    interpret: bool = False,
) -> tuple[Parts, Parts]:
    """Cotangents of mean and covariance after each segment, rows one after the other.

    Args:
        own_mean: what each segment asks of the mean that enters it, the last one all there is.
        own_covariance: likewise, symmetric.
        closed: Ψ of every segment but the last; more are not read.
        crossed: Λ, likewise.
        of_last_mean: cotangent of the mean after the last token.
        of_last_covariance: likewise, symmetric.
        segments: how many a row has.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows = len(of_last_mean)
    form = mosaic.operands_of(WIDTH)
    operand = mosaic.SMEM((PIECES, *SQUARE), jnp.bfloat16, transforms=form)
    run = mosaic.kernel(
        partial(_ends, segments=segments),
        dict.fromkeys(("mean", "covariance"), ((rows * segments, *SQUARE), jnp.float32)),
        {"row": rows},
        {
            **dict.fromkeys(("closed", "crossed", "faded_mean", "faded_covariance"), operand),
            "met": mosaic.barrier(num_arrivals=2),
        },
        2,
        interpret,
    )
    found = run(own_mean, own_covariance, closed, crossed, of_last_mean, of_last_covariance)
    return found["mean"], found["covariance"]


def _ends(*inputs, out, place, segments, interpret):
    own_mean, own_covariance, closed_in, crossed_in, of_last_mean, of_last_covariance = inputs
    closed, crossed, faded_mean, faded_covariance, met = place.values()
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    first = row * segments
    multiply = partial(mosaic.product, SQUARE, interpret=interpret)

    def put(place, state):
        for piece, part in enumerate(pieces(state, PIECES)):
            place.at[piece][...] = part

    def parts(place, turned=False):
        every = [place.at[piece] for piece in range(PIECES)]
        return [part.transpose((1, 0)) for part in every] if turned else every

    def times(left, right):
        return pairs(left, right, PIECES)

    def meet():
        mosaic.meet(met, interpret)

    def through(segment, state, own, loop, place, faded_place):
        """Bring Ψ or Λ to shared memory, and pass on the state by Ψ."""
        put(place, mosaic.load(loop.at[row, segment]))
        own = mosaic.load(own.at[first + segment])
        meet()
        faded = multiply(times(pieces(state, PIECES), parts(closed, turned=True)))
        put(faded_place, faded)
        meet()
        return faded, own

    def backwards(segment, own, of_last, out):
        """Cotangents after each segment, the last one's given: `segment` gives that before it."""

        def before(step, of_end):
            c = segments - 2 - step
            of_start = segment(c, of_end)
            out.at[first + c - 1][...] = of_start
            meet()
            return of_start

        last = first + segments - 1
        out.at[last][...] = mosaic.load(of_last.at[row])
        start = mosaic.load(own.at[last])
        out.at[last - 1][...] = start
        lax.fori_loop(0, segments - 2, before, start)

    @pl.when(warpgroup == 0)
    def _covariance():
        def segment(c, of_end):
            _, own = through(c, of_end, own_covariance, closed_in, closed, faded_covariance)
            terms = times(parts(crossed, turned=True), parts(faded_mean))
            terms += times(parts(faded_mean, turned=True), parts(crossed))
            of_start = 0.5 * multiply(terms) + own
            return of_start + multiply(times(parts(closed), parts(faded_covariance)))

        backwards(segment, own_covariance, of_last_covariance, out["covariance"])

    @pl.when(warpgroup == 1)
    def _mean():
        def segment(c, of_end):
            faded, own = through(c, of_end, own_mean, crossed_in, crossed, faded_mean)
            return faded + own

        backwards(segment, own_mean, of_last_mean, out["mean"])
