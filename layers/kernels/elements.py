r"""What a segment of a sequence does to any belief that enters it, in one pass over its tokens.

A segment's map of (M, P) is an element of the filtering scan (A, b, C, η, J): it says of its start
what values do whose information is J and whose weighted sum is η, moves what results by A, and adds
what it has found itself:

$$ P^+ = (P^{-1} + J)^{-1},\quad M^+ = (M P^{-1} + \eta) P^+,\quad
   M' = M^+ A + b,\quad P' = A^\top P^+ A + C. $$

The recursion of `kernels.forward` from P = 0 finds all five. Beside M, which starts from 0, runs Φ,
a memory that starts from I and to which 0 is written. With w and ŵ the whitened innovations of the
two,

$$ A = \Phi',\quad b = M',\quad C = P',\quad
   J = \sum_t \hat w_t \hat w_t^\top,\quad \eta = -\sum_t w_t \hat w_t^\top. $$

No matrix is inverted, and where nothing drifts P stays 0 and J is the sum of k kᵀ/r, to rounding.
Where a document starts Φ becomes 0 and ŵ stays so.

**Digits.** J may grow far above what a token adds to it, and has to stay positive semi-definite to
be of use. So each chunk's part is added to it in two numbers, what the sum rounds away kept beside.

**Layout.** Warpgroup 0 holds P, warpgroup 1 M and η, warpgroup 2 Φ and a chunk's part of J, whose
sum is in shared memory.
Warpgroup 0 whitens P's columns and M's, warpgroup 2 Φ's, each from its own factorisation of the
same G, which has two places in turn. M in two bfloat16 pieces, everything else in three.

Source: Särkkä & García-Fernández (2021), IEEE TAC 66(1), lemma 7; the maps are compared with the
filter token by token in tests/test_kernels.py.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import elimination, mosaic
from .blocks import Rates
from .covariance import (
    CHUNK,
    COVARIANCE_PIECES,
    WIDTH,
    across,
    fetch,
    identity,
    narrow_block,
    pieces_of,
    turn,
)
from .forward import MEAN_PIECES, split
from .mosaic import BLOCK, COLUMNS, along_columns, pairs, pieces

Squares = Float[Array, "*row key key"]

SQUARE = WIDTH, WIDTH
KEYS, VALUES, LOOP = (pl.ds(first, WIDTH) for first in (0, WIDTH, 2 * WIDTH))
"""Columns of what is whitened: covariances with the memory, M's innovations, and Φ's."""


class Element(NamedTuple):
    """A segment's map of the belief that enters it, by the letters above."""

    moved: Squares  # A
    mean: Squares  # b
    covariance: Squares  # C
    evidence: Squares  # η
    information: Squares  # J


def elements(
    key: Float[Array, "row time key"],
    value: Float[Array, "row time value"],
    rates: Rates,
    *,
    interpret: bool = False,
) -> Element:
    """The elements of rows of 64 values and 64 keys; time is a multiple of 64.

    Args:
        key: bfloat16 or float32, as are values.
        value: what is written.
        rates: of every token.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, time, _ = key.shape
    chunks, f32 = time // CHUNK, jnp.float32
    half = key.dtype == jnp.bfloat16
    depth, slots = (1, min(3, chunks)) if half else (COVARIANCE_PIECES, 1)
    shared = mosaic.SMEM
    plain, numbers = shared((slots, CHUNK, WIDTH), key.dtype), shared((slots, CHUNK), f32)
    columns = shared((BLOCK, 3 * WIDTH + 4), f32)
    pieced = shared((1, COVARIANCE_PIECES, WIDTH, BLOCK), jnp.bfloat16, transforms=mosaic.THIN)
    sources = split(key, depth), key, value, *(part for part in rates if part is not None)
    scratch = {
        "keys": shared((slots, depth, CHUNK, WIDTH), jnp.bfloat16, transforms=mosaic.THIN),
        "keys_plain": plain,
        "values": plain,
        **dict.fromkeys(("noises", "alphas", "drifts", "ends", "decays"), numbers),
        "ratios": shared((slots, CHUNK, BLOCK), f32),
        "deviations": shared((2, CHUNK), f32),
        "columns": columns,
        "whitened": columns,
        "joint": shared((2, CHUNK, BLOCK + 4), f32),
        **dict.fromkeys(("drawn", "moved", "guided"), pieced),
        **dict.fromkeys(("information", "rounded"), shared(SQUARE, f32)),
        "full": mosaic.barrier(num_arrivals=depth + len(sources) - 1, num_barriers=slots),
        "free": mosaic.barrier(num_arrivals=2, num_barriers=slots),
        "innovations_ready": mosaic.barrier(num_arrivals=2),
        **dict.fromkeys(
            ("joint_ready", "elimination_ready", "guided_ready"), mosaic.barrier(num_arrivals=1)
        ),
    }
    run = mosaic.kernel(
        partial(_body, chunks=chunks, slots=slots),
        dict.fromkeys(Element._fields, ((rows, *SQUARE), f32)),
        {"row": rows},
        scratch,
        3,
        interpret,
    )
    return Element(**run(*sources))


def _body(*sources, out, place, chunks, slots, interpret):
    out, targets = Element(**out), tuple(place.values())[: len(sources)]
    here = SimpleNamespace(**{"kept": None, "faded": None} | place, interpret=interpret)
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    lag = min(1, slots - 1)
    multiply = partial(mosaic.product, interpret=interpret)
    load = mosaic.load
    nothing = mosaic.zeros(SQUARE, mosaic.MATRIX)

    def bring(chunk, slot):
        fetch(here, sources, targets, row, chunk, slot)

    def leave(ref, state):
        ref.at[row][...] = state

    def through_blocks(block, c, carry):
        slot = lax.rem(c, slots)
        mosaic.barrier_wait(here.full.at[slot])

        def step(i, carry):
            return block(slot, i * BLOCK, pl.ds(i * BLOCK, BLOCK), carry)

        return lax.fori_loop(0, CHUNK // BLOCK, step, carry)

    def told(surprise):
        """What whitened innovations say of the start: their products with Φ's."""
        right = across(here.guided.at[0], COVARIANCE_PIECES, KEYS)
        left = pieces(surprise, COVARIANCE_PIECES)
        return multiply(SQUARE, pairs(left, right, COVARIANCE_PIECES))

    @pl.when(warpgroup == 0)
    def _covariance():
        for slot in range(slots):
            bring(slot, slot)
        block = narrow_block(reads=False)

        def chunk(c, covariance):
            after = through_blocks(
                lambda slot, start, _, state: block(here, slot, start, state), c, covariance
            )

            @pl.when(jnp.logical_and(c >= lag, c - lag + slots < chunks))
            def _():
                done = lax.rem(c - lag, slots)
                mosaic.barrier_wait(here.free.at[done])
                if lag == 0:  # this warpgroup's own warps may be reading the chunk yet
                    mosaic.commit_smem()
                bring(c - lag + slots, done)

            return after

        (covariance,) = lax.fori_loop(0, chunks, chunk, (nothing,))
        for c in range(chunks - slots, chunks):
            mosaic.barrier_wait(here.free.at[c % slots])
        leave(out.covariance, covariance)

    @pl.when(warpgroup == 1)
    def _mean():
        def block(slot, start, tokens, carry):
            mean, evidence = carry
            innovate(here, mean, MEAN_PIECES, slot, tokens, VALUES, here.values)
            mosaic.barrier_arrive(here.innovations_ready)
            mosaic.barrier_wait(here.elimination_ready)
            surprise = mosaic.load_transposed(here.whitened.at[:, VALUES])
            mean = update(here, mean, surprise, MEAN_PIECES, slot, start)
            mosaic.barrier_wait(here.guided_ready)
            return mean, evidence - told(surprise)

        def chunk(c, carry):
            carry = through_blocks(block, c, carry)
            mosaic.barrier_arrive(here.free.at[lax.rem(c, slots)])
            return carry

        mean, evidence = lax.fori_loop(0, chunks, chunk, (nothing, nothing))
        leave(out.mean, mean)
        leave(out.evidence, evidence)

    @pl.when(warpgroup == 2)
    def _loop():
        def block(slot, start, tokens, carry):
            loop, told_here = carry
            innovate(here, loop, COVARIANCE_PIECES, slot, tokens, LOOP)
            mosaic.barrier_arrive(here.innovations_ready)
            mosaic.barrier_wait(here.joint_ready)
            elimination.eliminate(
                here.joint.at[turn(start), tokens],
                here.noises.at[slot, tokens],
                None,
                here.columns.at[:, LOOP],
                here.whitened.at[:, LOOP],
                here.deviations.at[1, tokens],
                keys=0,
                interpret=interpret,
            )
            surprise = mosaic.load_transposed(here.whitened.at[:, LOOP])
            for piece, part in enumerate(pieces(surprise, COVARIANCE_PIECES)):
                here.guided.at[0, piece][...] = part
            mosaic.commit_smem()
            mosaic.barrier_arrive(here.guided_ready)
            told_here = told_here + told(surprise)
            mosaic.barrier_wait(here.elimination_ready)
            return update(here, loop, surprise, COVARIANCE_PIECES, slot, start), told_here

        def chunk(c, loop):
            loop, told_here = through_blocks(block, c, (loop, nothing))
            mosaic.barrier_arrive(here.free.at[lax.rem(c, slots)])
            before = load(here.information)
            told_here = told_here + load(here.rounded)
            after = before + told_here
            here.information[...] = after
            here.rounded[...] = told_here - (after - before)
            return loop

        here.information[...] = nothing
        here.rounded[...] = nothing
        leave(out.moved, lax.fori_loop(0, chunks, chunk, identity()))
        leave(out.information, load(here.information) + load(here.rounded))


def innovate(here, state, count, slot, tokens, columns, written=None):
    """Leave a memory's innovations to be whitened, in these columns; 0 is written where left out.

    Args:
        here: what lies in shared memory, by name.
        state: the memory before the block.
        count: pieces that it is split into.
        slot: where the chunk lies.
        tokens: of the chunk, the block's.
        columns: of what is whitened.
        written: values.
    """
    thin = WIDTH, BLOCK
    products = pairs(pieces(state, count), pieces_of(here.keys, slot, tokens), count)
    expected = mosaic.product(thin, products, here.interpret)
    expected = expected * along_columns(mosaic.load(here.alphas.at[slot, tokens], COLUMNS), thin)
    written = 0 if written is None else mosaic.load_transposed(written.at[slot, tokens])
    mosaic.store_transposed(here.columns.at[:, columns], written - expected)


def update(here, state, surprise, count, slot, start):
    """A memory after the block that starts there, given its whitened innovations."""
    tokens = pl.ds(start, BLOCK)
    end = along_columns(mosaic.load(here.ends.at[slot, tokens], COLUMNS), (WIDTH, BLOCK))
    right = across(here.moved.at[0], count, KEYS)
    products = pairs(pieces(surprise * end, count), right, count)
    moved = mosaic.product(SQUARE, products, here.interpret)
    return state * here.alphas[slot, start + BLOCK - 1] + moved
