"""Vectors with an entry for each of a warpgroup's 128 threads, which are two halves of 64.

What has ratios for each key is found by threads that own a key, or a token, and go through the
others one by one: no ratio is then an exponential, or kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, vector

from .mosaic import BLOCK, THREADS, WARPGROUP

HALF = WARPGROUP // 2

Vector = jax.Array
_VECTOR: Any = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=THREADS)


class Threads:
    """Loads and stores of vectors.

    Args:
        interpret: whether the kernel is interpreted.
    """

    def __init__(self, interpret: bool):
        self.interpret = interpret
        self.index = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=THREADS)
        self.first = self.index < HALF
        """Which threads are the first half."""

    def number(self, value: float) -> Vector:
        return plgpu.layout_cast(jnp.full((WARPGROUP,), value, jnp.float32), THREADS)

    def own(self, one: Vector, other: Vector) -> Vector:
        """The first half of one, the second of the other."""
        return jnp.where(self.first, one, other)

    def row(self, ref) -> Vector:
        """A reference's 64 entries, in one row or several, to both halves."""
        if self.interpret:
            return jnp.tile(ref[...].reshape(-1), 2)
        return _row(ref)  # pyright: ignore[reportCallIssue]

    def halves(self, ref) -> Vector:
        """A reference of (2, 64)."""
        return ref[...].reshape(-1) if self.interpret else _halves(ref)  # pyright: ignore[reportCallIssue]

    def put(self, ref, value: Vector):
        """Store to a reference of (2, 64)."""
        if self.interpret:
            ref[...] = value.reshape(2, HALF)
        else:
            _put(ref, value)  # pyright: ignore[reportCallIssue]

    def put_row(self, ref, value: Vector):
        """Store what is the same in both halves to a reference of 64, in one row or several."""
        if self.interpret:
            ref[...] = value[:HALF].reshape(ref.shape)
        else:
            _put_row(ref, value)  # pyright: ignore[reportCallIssue]

    def spread(self, ref) -> list[Vector]:
        """Of a reference of (2, n), n vectors: the n-th entry of each half's row to all of it."""
        if self.interpret:
            entries = ref[...]
            return [jnp.repeat(entries[:, n], HALF) for n in range(entries.shape[1])]
        return self._spread(ref)

    def spread_blocks(self, ref, n) -> list[Vector]:
        """Of a reference of (2, 64, ...): `spread`, but of row n of every block of 16 to it."""
        rows = ref.at[:, pl.ds(n, HALF - BLOCK + 1)]
        if self.interpret:
            entries = rows[...][:, ::BLOCK]
            places = range(entries.shape[-1])
            return [jnp.repeat(entries[..., n].reshape(-1), BLOCK) for n in places]
        return self._spread(rows)

    def put_blocks(self, ref, n, value: Vector):
        """Store each block's entries to row n of its rows in a reference of (2, 64, 16)."""
        if self.interpret:
            entries = value.reshape(2, -1, BLOCK)
            for block in range(entries.shape[1]):
                ref.at[:, block * BLOCK + n][...] = entries[:, block]
        else:
            _put_blocks(ref.at[:, pl.ds(n, HALF - BLOCK + 1)], value)  # pyright: ignore[reportCallIssue]

    def _spread(self, ref) -> list[Vector]:
        count = ref.shape[-1]
        form: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(_VECTOR,) * count)
        return list(form(partial(_spread, count=count))(ref))


def _places() -> tuple[ir.Value, ir.Value]:
    """A thread's half and its place in it."""
    index = ir.IndexType.get()
    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), arith.constant(index, WARPGROUP))
    half = arith.constant(index, HALF)
    return arith.divui(thread, half), arith.remui(thread, half)


def _place_in(ref) -> list[ir.Value]:
    """A thread's place in its half, where that is one row or several."""
    _, place = _places()
    columns = arith.constant(place.type, ref.type.shape[-1])
    places = arith.divui(place, columns), arith.remui(place, columns)
    return list(places[-len(ref.type.shape) :])


def _array(entry: ir.Value) -> FragmentedArray:
    of_one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.array([vector.broadcast(of_one, entry)], dtype=object)
    layout = THREADS.to_mgpu()
    return FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((WARPGROUP,))),
        _layout=layout,
        _is_signed=None,
    )


def _entry(array: FragmentedArray) -> ir.Value:
    return vector.extract(array.registers.item(), dynamic_position=[], static_position=[0])


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_VECTOR)
def _row(ctx, ref):
    del ctx
    return _array(memref.load(ref, _place_in(ref)))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_VECTOR)
def _halves(ctx, ref):
    del ctx
    return _array(memref.load(ref, list(_places())))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), THREADS))
def _put(ctx, ref, value):
    del ctx
    memref.store(_entry(value), ref, list(_places()))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), THREADS))
def _put_row(ctx, ref, value):
    del ctx
    memref.store(_entry(value), ref, _place_in(ref))


def _first_of_block(place: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first place of a place's block, and how far on it is."""
    since = arith.remui(place, arith.constant(place.type, BLOCK))
    return arith.subi(place, since), since


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), THREADS))
def _put_blocks(ctx, ref, value):
    del ctx
    half, place = _places()
    memref.store(_entry(value), ref, [half, *_first_of_block(place)])


def _spread(ctx, ref, *, count):
    del ctx
    half, place = _places()
    index, f32 = ir.IndexType.get(), ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    rows = [half, _first_of_block(place)[0]][: len(ref.type.shape) - 1]
    found = []
    for start in range(0, count, 4):
        loaded = vector.load(four, ref, [*rows, arith.constant(index, start)])
        found += [
            _array(vector.extract(loaded, dynamic_position=[], static_position=[n]))
            for n in range(4)
        ]
    return tuple(found)
