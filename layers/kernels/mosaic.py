r"""Every use of Pallas Mosaic GPU's names but those of `threads`, and what kernels build on them.

A matrix in registers is spread over a warpgroup in the layout of its tensor cores' accumulators
(`MATRIX`); vectors along its rows and columns are in `ROWS` and `COLUMNS`. The tensor cores take
16-bit operands, so a float32 operand is a sum of bfloat16 pieces (`pieces`): three hold all of
float32's digits, two leave 2⁻¹⁷. Products of pieces whose indices sum to the count or more are
below what is kept, and left out (`product`).
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, nvvm
from jaxlib.mlir.dialects import math as mlir_math

BLOCK = 16
"""Tokens that are eliminated together."""

WARPGROUP = 128

PROCESSORS = 132
"""Multiprocessors of a Hopper GPU."""

MATRIX = plgpu.Layout.WGMMA
ROWS = MATRIX.reduce(1)
COLUMNS = MATRIX.reduce(0)
_TRANSPOSED = plgpu.Layout._WGMMA_ACC_32BIT
THREADS = plgpu.Layout.TILED(
    plgpu.Tiling(((128,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
"""One entry per thread."""


def operands_of(columns: int, size: int = 2) -> tuple[Any, ...]:
    """How shared memory holds a tensor-core operand that is read by so many columns at a time.

    Args:
        columns: how many.
        size: bytes of an entry.
    """
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzle(size * columns)


THIN = operands_of(BLOCK)
"""For operands that are 16 columns wide or are read so."""

ENTRIES = operands_of(8, 4)
"""For float32 matrices that are copied in and loaded as `MATRIX`, without bank conflicts."""

SMEM, barrier, barrier_arrive, barrier_wait = (
    plgpu.SMEM,
    plgpu.Barrier,
    plgpu.barrier_arrive,
    plgpu.barrier_wait,
)
commit_smem, copy_in, copy_out, wait_out = (
    plgpu.commit_smem,
    plgpu.copy_gmem_to_smem,
    plgpu.copy_smem_to_gmem,
    plgpu.wait_smem_to_gmem,
)


def kernel(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    grid: dict[str, int],
    scratch: Sequence[Any],
    warpgroups: int,
    interpret: bool,
    *,
    reduction_bytes: int = 6144,
) -> Callable[..., Any]:
    """A kernel whose warpgroups are axis "wg"; synchronisation is its body's own.

    Interpreted, it prints every race between warpgroups that it finds.
    """
    simulated: dict[str, Any] = {}
    if interpret:
        simulated["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=tuple(scratch),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=reduction_bytes,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **simulated,
    )


def lowering_device() -> AbstractDevice:
    """A Hopper GPU for which programs can be lowered where there is none."""
    return AbstractDevice("NVIDIA H200", PROCESSORS, "gpu")


def lowering_mesh():
    """A context in which programs are lowered for that device."""
    mesh = AbstractMesh((), (), abstract_device=lowering_device())
    return jax.sharding.use_abstract_mesh(mesh)


def meet(met, interpret: bool):
    """Wait for all warpgroups, whose stores to shared memory all then see."""
    if interpret:
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
    else:
        _meet()  # pyright: ignore[reportCallIssue]


@plgpu.inline_mgpu()
def _meet(ctx):
    # The hardware's barrier of the whole program; a barrier in shared memory takes several
    # times as long.
    del ctx
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
    gpu.barrier()


def uniform(number: jax.Array, interpret: bool) -> jax.Array:
    """An int32 that all threads share, which the compiler then knows.

    What is indexed by it has its addresses found once a warp, not by every thread.
    """
    return number if interpret else _uniform(number)  # pyright: ignore[reportCallIssue]


_SCALAR: Any = plgpu.Layout.WG_SPLAT(())


@plgpu.inline_mgpu(
    arg_types=(_SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)
)
def _uniform(ctx, number):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    every, lane, clamp = (arith.constant(i32, word) for word in (0xFFFFFFFF, 0, 0x1F))
    shared = nvvm.shfl_sync(every, number.registers.item(), lane, clamp, nvvm.ShflKind.idx)
    return FragmentedArray.splat(shared, (), is_signed=number.is_signed)


def prefetch(ref, interpret: bool):
    """Bring global memory to the second-level cache."""
    if not interpret:
        plgpu.async_prefetch(ref)


def load(ref, layout: Any = MATRIX) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def load_threads(ref) -> jax.Array:
    """A vector of 128 entries, one per thread."""
    return plgpu.load(ref, layout=THREADS, optimized=False)


def load_transposed(ref) -> jax.Array:
    """A (row, column) reference as a (column, row) float32 matrix."""
    loaded = plgpu.load(ref.transpose((1, 0)), layout=_TRANSPOSED, optimized=False)
    return plgpu.layout_cast(loaded.astype(jnp.float32), MATRIX)


def store_transposed(ref, matrix: jax.Array):
    ref.transpose((1, 0))[...] = plgpu.layout_cast(matrix, _TRANSPOSED).astype(ref.dtype)


def zeros(shape: tuple[int, ...], layout: Any = MATRIX) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def index(shape: tuple[int, ...], axis: int, layout: Any = MATRIX) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def along_rows(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Entry i of a vector all along row i."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def along_columns(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Entry j of a vector all along column j."""
    return lax.broadcast_in_dim(vector, shape, (1,))


def pieces(matrix: jax.Array, count: int) -> list[jax.Array]:
    """Bfloat16 matrices that sum to a float32 matrix, largest first.

    All but the last are rounded by integer arithmetic, which is quicker than converting twice.
    """
    out = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(matrix, jnp.int32) + jnp.int32(0x8000)
        high = lax.bitcast_convert_type(bits & jnp.int32(-0x10000), jnp.float32)
        out.append(high.astype(jnp.bfloat16))
        matrix = matrix - high
    return [*out, matrix.astype(jnp.bfloat16)]


_accumulator = partial(plgpu.ACC, dtype=jnp.float32)  # pyright: ignore[reportPrivateImportUsage]

Operand = jax.Array | Any
"""A bfloat16 matrix in registers, or a reference to one in shared memory."""


def pairs(
    left: Sequence[Operand], right: Sequence[Operand], count: int
) -> list[tuple[Operand, Operand]]:
    """Pairs of pieces that matter for `count` pieces' accuracy."""
    return [
        (one, other)
        for i, one in enumerate(left)
        for j, other in enumerate(right)
        if i + j < max(count, len(left), len(right))
    ]


def product(
    shape: tuple[int, int], terms: Sequence[tuple[Operand, Operand]], interpret: bool
) -> jax.Array:
    """Sum of matrix products; right operands lie in shared memory."""
    if interpret:  # the interpreter has no product whose left operand is in registers

        def value(operand):
            array = operand if isinstance(operand, jax.Array) else plgpu.load(operand)
            return array.astype(jnp.float32)

        products = [jnp.dot(value(x), value(y), precision="highest") for x, y in terms]
        return sum(products[1:], products[0])

    def accumulate(accumulator):
        for one, other in terms:
            plgpu.wgmma(accumulator, one, other)
        return accumulator[...]

    return pl.run_scoped(accumulate, _accumulator(shape))


def product_beside[Done](
    shape: tuple[int, int],
    terms: Sequence[tuple[Operand, Operand]],
    work: Callable[[], Done],
    interpret: bool,
) -> tuple[jax.Array, Done]:
    """`product`, the tensor cores at it while the threads do other work, and what that returns."""
    if interpret:
        done = work()
        return product(shape, terms, interpret), done

    def accumulate(accumulator):
        for one, other in terms:
            plgpu.wgmma(accumulator, one, other)
        done = work()
        return accumulator[...], done

    return pl.run_scoped(accumulate, _accumulator(shape))


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
            for index, entries in enumerate(solved):
                rest = rest - factor[start + row, start + index] * entries
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
        for index, entry in enumerate(solved):
            known = memref.load(factor, [here, plus(start, at(index))])
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

    Where keys decay each at its own rate, so do their columns. With `decay` None, every warpgroup
    whitens the same 64 columns, which do not decay.

    Args:
        joint: (16, 16) in shared memory.
        noise: (16,).
        decay: a, or λ a, (16,); or a (16, 64); or None.
        columns: e, (16, keys + 64), or (16, 64).
        whitened: where u is left.
        inverse_deviation: (16,), where 1/L_tt is left.
        keys: how many columns decay, 64 a warpgroup.
        kept: λ, (16,); None for 1.
        interpret: whether the kernel is interpreted, which knows no shuffles.
    """
    form: Any = _eliminate_plainly if interpret else _eliminate_by_shuffles
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


def _eliminate_by_shuffles(
    keys, names, ctx, joint, noise, columns, whitened, inverse_deviation, *rates
):
    # Row m of G lies in the registers of lane m % 16 of every warp, and warp shuffles broadcast
    # its entries; two pivots share the latency of a reciprocal root.
    del ctx
    rates = dict(zip(names, rates, strict=True))
    decay, restored = rates.get("decay"), rates.get("restored")
    f32 = ir.F32Type.get()
    i32 = ir.IntegerType.get_signless(32)
    position = ir.IndexType.get()
    contract = arith.FastMathFlags.contract

    def times(x, y):
        return arith.mulf(x, y, fastmath=contract)

    def plus(x, y):
        return arith.addf(x, y, fastmath=contract)

    def times_plus(x, y, z):
        return mlir_math.fma(x, y, z)

    def at(number):
        return arith.constant(position, number)

    def word(number):
        return arith.constant(i32, number)

    def reciprocal_root(x):
        return mosaic_utils.inline_ptx(
            "rsqrt.approx.ftz.f32 $0, $1;", x, result_types=f32, has_side_effects=False
        )

    def from_lane(x, lane):
        moved = nvvm.shfl_sync(
            word(0xFFFFFFFF), arith.bitcast(i32, x), word(lane), word(0x1F), nvvm.ShflKind.idx
        )
        return arith.bitcast(f32, moved)

    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
    lane = arith.remui(thread, at(BLOCK))
    one = arith.constant(f32, 1.0)
    fading = arith.cmpi(arith.CmpIPredicate.ult, thread, at(64))
    place, owned = thread, None
    if decay is None:
        place = arith.remui(thread, at(64))
    elif keys > 64:
        warpgroup = arith.divui(gpu.thread_id(gpu.Dimension.x), at(WARPGROUP))
        first = arith.muli(warpgroup, at(64))
        place = arith.addi(thread, arith.select(fading, first, at(keys - 64)))
        owned = arith.ori(fading, arith.cmpi(arith.CmpIPredicate.eq, warpgroup, at(0)))
    # Generic stores to shared memory alone are waited for: no operand of the tensor cores.
    mosaic_utils.warpgroup_barrier()
    entry = [memref.load(joint, [lane, at(j)]) for j in range(BLOCK)]
    own_noise = memref.load(noise, [lane])
    kept = [one] * BLOCK
    if decay is not None:
        own = [arith.remui(thread, at(64))] if len(decay.type.shape) == 2 else []
        kept[1:] = [
            arith.select(fading, memref.load(decay, [at(j), *own]), one) for j in range(1, BLOCK)
        ]
    column = [memref.load(columns, [at(j), place]) for j in range(BLOCK)]
    shares = [] if restored is None else [memref.load(restored, [at(j)]) for j in range(BLOCK)]

    def leave(j, scale):
        with contextlib.nullcontext() if owned is None else mosaic_utils.when(owned):
            memref.store(column[j], whitened, [at(j), place])
        memref.store(scale, inverse_deviation, [at(j)])

    for j in range(0, BLOCK, 2):
        first = from_lane(plus(entry[j], own_noise), j)
        between = from_lane(entry[j], j + 1)
        second = from_lane(plus(entry[j + 1], own_noise), j + 1)
        rest = range(j + 2, BLOCK)
        # The next pivots' rows are scaled by every lane, while others wait for the lanes that own
        # them: fewer instructions, and those in turn do not wait.
        below = {m: (from_lane(entry[j], m), from_lane(entry[j + 1], m)) for m in rest[:2]}
        lasting = times(between, shares[j + 1]) if shares else between
        determinant = times_plus(arith.negf(between), lasting, times(first, second))
        scale = reciprocal_root(first)
        scale_second = times(reciprocal_root(times(determinant, first)), first)
        factor = times(between, scale)
        minus_square = arith.negf(times(times(lasting, scale), scale))
        column[j] = times(column[j], scale)
        leave(j, scale)
        faded = times(column[j], kept[j + 1])
        column[j + 1] = times(times_plus(faded, arith.negf(factor), column[j + 1]), scale_second)
        leave(j + 1, scale_second)
        if not len(rest):
            break

        def scaled_second(one, other, square=minus_square, scale=scale_second):
            return times(times_plus(one, square, other), scale)

        own = arith.negf(times(entry[j], scale))
        own_second = arith.negf(scaled_second(entry[j], entry[j + 1]))
        faded = arith.negf(faded)
        faded_second = arith.negf(column[j + 1])
        share, share_second = (shares[j + 1], one) if shares else (one, one)
        for m in rest:
            faded, faded_second = times(faded, kept[m]), times(faded_second, kept[m])
            if m in below:
                row, row_second = times(below[m][0], scale), scaled_second(*below[m])
            else:
                row, row_second = (arith.negf(from_lane(x, m)) for x in (own, own_second))
            column[m] = times_plus(faded_second, row_second, times_plus(faded, row, column[m]))
            if shares:
                share, share_second = times(share, shares[m]), times(share_second, shares[m])
                row, row_second = times(row, share), times(row_second, share_second)
            entry[m] = times_plus(own_second, row_second, times_plus(own, row, entry[m]))
    mosaic_utils.warpgroup_barrier()
