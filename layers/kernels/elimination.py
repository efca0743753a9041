"""A block's triangular systems, solved by threads: what is whitened, and inverses of factors."""

import contextlib
from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, vector
from jaxlib.mlir.dialects import math as mlir_math

from .mosaic import BLOCK, THREADS, WARPGROUP, index, meet_warp


def invert_blocks(factor, scale, first, interpret: bool):
    """Invert, in place, a warpgroup's two diagonal blocks of 16 of a lower-triangular matrix.

    Args:
        factor: (64, 64) in shared memory; entries off those blocks are left.
        scale: (64,), one over the diagonal.
        first: the warpgroup's first column, of 32.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        _invert_blocks_plainly(factor, scale, first)
    else:
        by_threads: Any = _invert_blocks_by_threads
        by_threads(factor, scale)


def _invert_blocks_plainly(factor, scale, first):
    for start in (first, first + BLOCK):
        solved = []
        for row in range(BLOCK):
            rest = (lax.iota(jnp.int32, BLOCK) == row).astype(jnp.float32)
            for before, entries in enumerate(solved):
                rest = rest - factor[start + row, start + before] * entries
            solved.append(rest * scale[start + row])
        for row, entries in enumerate(solved):
            factor[start + row, pl.ds(start, BLOCK)] = entries


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
def _invert_blocks_by_threads(ctx, factor, scale):
    # Every warp does the same, each of its threads a column.
    del ctx
    f32 = ir.F32Type.get()
    position = ir.IndexType.get()
    contract = arith.FastMathFlags.contract

    def at(number):
        return arith.constant(position, number)

    def plus(one, other):
        return arith.addi(one, other)

    thread = gpu.thread_id(gpu.Dimension.x)
    warpgroup = arith.divui(thread, at(WARPGROUP))
    own = plus(arith.muli(warpgroup, at(2 * BLOCK)), arith.remui(thread, at(2 * BLOCK)))
    column = arith.remui(thread, at(BLOCK))
    start = arith.muli(arith.divui(own, at(BLOCK)), at(BLOCK))
    zero, one = arith.constant(f32, 0.0), arith.constant(f32, 1.0)
    mosaic_utils.warpgroup_barrier()
    solved = []
    for row in range(BLOCK):
        here = plus(start, at(row))
        unit = arith.cmpi(arith.CmpIPredicate.eq, column, at(row))
        total = arith.select(unit, one, zero)
        for before, entry in enumerate(solved):
            known = memref.load(factor, [here, plus(start, at(before))])
            total = mlir_math.fma(arith.negf(known), entry, total)
        solved.append(arith.mulf(total, memref.load(scale, [here]), fastmath=contract))
    mosaic_utils.warpgroup_barrier()
    for row, entry in enumerate(solved):
        memref.store(entry, factor, [plus(start, at(row)), own])
    mosaic_utils.warpgroup_barrier()


def eliminate(
    joint,
    noise,
    decay,
    columns,
    whitened,
    inverse_deviation,
    *,
    keys: int,
    kept: Any = None,
    interpret: bool,
):
    r"""Whiten a block of 16 tokens, each thread its own column.

    With G = joint + diag(noise) = L Lᵀ, whose lower triangle is read,

    $$ u_t = \Bigl(e_t - \sum_{s<t} L_{ts}\, a_{s+1}\cdots a_t\, u_s\Bigr) / L_{tt} $$

    for columns of keys, which decay, and the same with a = 1 for the 64 of values that follow.
    Warpgroup g whitens keys 64 g to 64 g + 63, the first one values too; where nothing
    decays, the warpgroup that calls whitens all 64.

    Where a restoration keeps λ of the covariance, and memory decays less than its deviation does,
    `joint` and L are in the memory's decay, joint_ts = ρ_ts k_t·e_s, so that no ratio is above 1:

    $$ L_{ts} L_{ss} = \mathrm{joint}_{ts} - \sum_{r<s} L_{tr} L_{sr}\,
       \lambda_{r+1}\cdots\lambda_s $$

    and keys' columns decay by λ a.

    Where keys decay each at its own rate, so do their columns.

    Args:
        joint: (16, 16) in shared memory.
        noise: (16,).
        decay: a, or λ a, (16,); or a (16, 64); or None.
        columns: e, (16, keys + 64), or (16, 64).
        whitened: where u is left.
        inverse_deviation: (16,), where 1/L_tt is left.
        keys: how many columns decay, 64 a warpgroup; 0 with `decay` None.
        kept: λ, (16,); None for 1.
        interpret: whether the kernel is interpreted, which knows no threads.
    """
    form: Any = _eliminate_plainly if interpret else _eliminate_by_fours
    places = joint, noise, columns, whitened, inverse_deviation
    rates = {"decay": decay, "restored": kept}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    form = partial(form, keys, tuple(given))
    if not interpret:
        form = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(places) + len(given)))(form)
    form(*places, *given.values())


def _eliminate_plainly(keys, names, joint, noise, columns, whitened, inverse_deviation, *rates):
    rates = dict(zip(names, rates, strict=True))
    decay, restored = rates.get("decay"), rates.get("restored")
    warpgroup = lax.axis_index("wg")
    entry = [[joint[m, n] for n in range(m + 1)] for m in range(BLOCK)]
    thread = index((WARPGROUP,), 0, THREADS)
    ones = jnp.ones((WARPGROUP,), jnp.float32)
    if decay is None:
        kept = [ones[:64]] * BLOCK
    elif len(decay.shape) == 2:
        kept = [jnp.concatenate([decay[t], ones[:64]]) for t in range(BLOCK)]
    else:
        kept = [jnp.where(thread < 64, ones * decay[t], ones) for t in range(BLOCK)]
    own, values = pl.ds(warpgroup * 64, 64), pl.ds(keys, 64)
    if decay is None:
        own, column = pl.ds(0, 64), [columns[t, pl.ds(0, 64)] for t in range(BLOCK)]
    else:
        column = [jnp.concatenate([columns[t, own], columns[t, values]]) for t in range(BLOCK)]
    for t in range(BLOCK):
        scale = lax.rsqrt(entry[t][t] + noise[t])
        column[t] = column[t] * scale
        whitened[t, own] = column[t][:64]
        if decay is not None:

            @pl.when(warpgroup == 0)
            def _(t=t):
                whitened[t, values] = column[t][64:]

        inverse_deviation[t] = scale
        factor = {m: entry[m][t] * scale for m in range(t + 1, BLOCK)}
        faded, lasting, share = column[t], {}, jnp.float32(1)
        for m in range(t + 1, BLOCK):
            share = share if restored is None else share * restored[m]
            lasting[m] = factor[m] * share
            faded = faded * kept[m]
            column[m] = column[m] - factor[m] * faded
            for n in range(t + 1, m + 1):
                entry[m][n] = entry[m][n] - factor[m] * lasting[n]


def _eliminate_by_fours(
    keys, names, ctx, joint, noise, columns, whitened, inverse_deviation, *rates
):
    # Row m of G lies in the registers of lane m % 16 of every warp. Four pivots are taken at once:
    # their rows, and those of L below, reach all lanes by way of the warp's own columns of the last
    # four rows of `whitened`, where a load brings four numbers and a shuffle one. Two pivots share
    # the latency of a reciprocal root. What the next pivots do not wait for is done while they are
    # on the way. Rows start at multiples of 16 bytes.
    del ctx
    rates = dict(zip(names, rates, strict=True))
    decay, restored = rates.get("decay"), rates.get("restored")
    f32 = ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    position = ir.IndexType.get()
    contract = arith.FastMathFlags.contract

    def times(x, y):
        return arith.mulf(x, y, fastmath=contract)

    def plus(x, y):
        return arith.addf(x, y, fastmath=contract)

    def more(total, row, other):
        for x, y in zip(row, other, strict=True):
            total = times(x, y) if total is None else mlir_math.fma(x, y, total)
        return total

    def less(total, row, other):
        return more(total, [arith.negf(x) for x in row], other)

    def at(number):
        return arith.constant(position, number)

    def reciprocal_root(x):
        return mosaic_utils.inline_ptx(
            "rsqrt.approx.ftz.f32 $0, $1;", x, result_types=f32, has_side_effects=False
        )

    def fetch(ref, *place):
        loaded = vector.load(four, ref, place, alignment=16)
        return [vector.extract(loaded, dynamic_position=[], static_position=[n]) for n in range(4)]

    def put(numbers, ref, *place):
        vector.store(vector.from_elements(four, numbers), ref, place, alignment=16)

    def pair(first, between, second, share):
        """Of two pivots: what scales each, and what a row's second entry has of its first."""
        lasting = times(between, share)
        determinant = less(times(first, second), [between], [lasting])
        scale = reciprocal_root(first)
        scale_second = times(reciprocal_root(times(determinant, first)), first)
        return scale, scale_second, times(times(lasting, scale), scale)

    def divided(row, by):
        scale, scale_second, ratio = by
        return [times(row[0], scale), times(less(row[1], row[:1], [ratio]), scale_second)]

    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
    lane = arith.remui(thread, at(BLOCK))
    one = arith.constant(f32, 1.0)
    fading = arith.cmpi(arith.CmpIPredicate.ult, thread, at(64))
    place, owned = thread, None
    if decay is None:
        owned = fading
    elif keys > 64:
        warpgroup = arith.divui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
        first = arith.muli(warpgroup, at(64))
        place = arith.addi(thread, arith.select(fading, first, at(keys - 64)))
        owned = arith.ori(fading, arith.cmpi(arith.CmpIPredicate.eq, warpgroup, at(0)))

    def fades_of(start):
        if decay is None:
            return [one] * 4
        if len(decay.type.shape) == 1:
            fades = fetch(decay, at(start))
        else:
            own = arith.remui(thread, at(64))
            fades = [memref.load(decay, [at(start + n), own]) for n in range(4)]
        return [arith.select(fading, fade, one) for fade in fades]

    def whiten():
        of_warp = arith.subi(place, arith.remui(thread, at(32)))
        eights = at(8)

        def put_own(numbers, row):
            after = arith.muli(arith.remui(lane, eights), at(4))
            line = arith.addi(at(row), arith.divui(lane, eights))
            put(numbers, whitened, line, arith.addi(of_warp, after))
            meet_warp()

        def fetch_of(m, row):
            return fetch(whitened, at(row + m // 8), arith.addi(of_warp, at(4 * (m % 8))))

        rows = [fetch(joint, at(m), at(0)) for m in range(4)]
        noises = fetch(noise, at(0))
        entry = [x for j in range(0, BLOCK, 4) for x in fetch(joint, lane, at(j))]
        told: list[Any] = [None] * BLOCK  # of the pivots so far, until the last of them
        shares = [one] * BLOCK
        if restored is not None:
            shares = [x for j in range(0, BLOCK, 4) for x in fetch(restored, at(j))]

        def update(start, own, m):
            row = fetch_of(m, 12)
            if restored is None:
                entry[m] = less(entry[m], own, row)
            else:
                share = reduce(times, shares[start + 4 : m + 1])
                entry[m] = less(entry[m], [share], [more(None, own, row)])
            return row

        def leave(start, written, scales, lower, below, own):
            put(scales, inverse_deviation, at(start))
            since, faded = one, []
            for n, fade in enumerate(fades_of(start)):
                since, m = times(since, fade), start + n
                column = written[n] if told[m] is None else less(written[n], [told[m]], [since])
                faded = [times(x, fade) for x in faded]
                faded.append(times(less(column, faded, lower[n]), scales[n]))
                memref.store(faded[n], whitened, [at(m), place])
            for m in range(start + 4, BLOCK):
                row = below[m] if m in below else update(start, own, m)
                kept = None if told[m] is None else times(told[m], since)
                told[m] = more(kept, row, faded)
            meet_warp()

        after: Any = None
        for start in range(0, BLOCK, 4):
            if after is not None:
                put_own(entry[start : start + 4], 14)
                rows = [fetch_of(start + n, 14) for n in range(4)]
                noises = fetch(noise, at(start))
                after()
            written = [memref.load(columns, [at(start + n), place]) for n in range(4)]
            diagonal = [plus(rows[n][n], noises[n]) for n in range(4)]
            shared = shares[start : start + 4]
            until_third = [times(shared[1], shared[2]), shared[2]]
            until_last = [*(times(share, shared[3]) for share in until_third), shared[3]]
            head = pair(diagonal[0], rows[1][0], diagonal[1], shared[1])
            third, last = divided(rows[2], head), divided(rows[3], head)
            third_kept = list(map(times, third, until_third))
            last_kept = list(map(times, last, until_last))
            between = less(rows[3][2], last, third_kept)
            tail = pair(
                less(diagonal[2], third, third_kept),
                between,
                less(diagonal[3], last, last_kept),
                shared[3],
            )
            scales = [*head[:2], *tail[:2]]
            lower = [[], [times(rows[1][0], head[0])], third, [*last, times(between, tail[0])]]
            if start + 4 < BLOCK:
                own = divided(entry[start : start + 2], head)
                rest = [
                    less(entry[start + 2], own, third_kept),
                    less(entry[start + 3], own, last_kept),
                ]
                own += divided(rest, tail)
                put_own(own, 12)
                own = [*map(times, own, until_last), own[3]]
                below = {m: update(start, own, m) for m in range(start + 4, start + 8)}
            else:
                below, own = {}, None
            after = partial(leave, start, written, scales, lower, below, own)
        after()

    # Generic stores to shared memory alone are waited for: no operand of the tensor cores.
    mosaic_utils.warpgroup_barrier()
    with contextlib.nullcontext() if owned is None else mosaic_utils.when(owned):
        whiten()
    mosaic_utils.warpgroup_barrier()
