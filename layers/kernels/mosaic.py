r"""Pallas Mosaic GPU's names, and what kernels build on them; threads' own work lies elsewhere.

`threads` and `elimination` alone use more of its names: they say what each thread does.

A matrix in registers is spread over a warpgroup in the layout of its tensor cores' accumulators
(`MATRIX`); vectors along its rows and columns are in `ROWS` and `COLUMNS`. The tensor cores take
16-bit operands, so a float32 operand is a sum of bfloat16 pieces (`pieces`): three hold all of
float32's digits, two leave 2⁻¹⁷. Products of pieces whose indices sum to the count or more are
below what is kept, and left out (`pairs`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

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
    out: Mapping[str, tuple[tuple[int, ...], Any]],
    grid: dict[str, int],
    scratch: Mapping[str, Any],
    warpgroups: int,
    interpret: bool,
    *,
    reduction_bytes: int = 6144,
) -> Callable[..., dict[str, jax.Array]]:
    """A kernel whose warpgroups are axis "wg"; synchronisation is its body's own.

    Interpreted, it prints every race between warpgroups that it finds. Profiles call it by its
    body's module and name.

    Args:
        body: is given references: to the inputs, one after the other, to outputs, `out`, and to
            scratch, `place`, both by name; and `interpret`.
        out: shape and dtype of each output.
        grid: programs along each axis.
        scratch: shared memory and barriers.
        warpgroups: of a program.
        interpret: whether to run its simulation on a CPU.
        reduction_bytes: of shared memory, for sums over threads.

    Returns:
        From arrays to each output by name.
    """
    simulated: dict[str, Any] = {}
    if interpret:
        simulated["interpret"] = plgpu.InterpretGPUParams(detect_races=True)

    def by_name(*refs):
        last = len(refs) - len(scratch)
        first = last - len(out)
        found = dict(zip(out, refs[first:last], strict=True))
        place = dict(zip(scratch, refs[last:], strict=True))
        body(*refs[:first], out=found, place=place, interpret=interpret)

    function = getattr(body, "func", body)
    by_name.__name__ = function.__module__.rpartition(".")[2] + function.__name__
    run = plgpu.kernel(
        by_name,
        out_type=tuple(jax.ShapeDtypeStruct(*kind) for kind in out.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=reduction_bytes,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **simulated,
    )
    return lambda *inputs: dict(zip(out, run(*inputs), strict=True))


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
        _meet_warp()  # pyright: ignore[reportCallIssue]
        return accumulator[...], done

    return pl.run_scoped(accumulate, _accumulator(shape))


@plgpu.inline_mgpu()
def _meet_warp(ctx):
    # The compiler would otherwise put loads off until the product has been waited for.
    del ctx
    meet_warp()


def meet_warp():
    """Within what each thread does: wait for all of a warp, whose stores all then see."""
    nvvm.bar_warp_sync(arith.constant(ir.IntegerType.get_signless(32), 0xFFFFFFFF))
