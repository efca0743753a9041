"""Kernels take rows, of which each is a program: one row's function, and `jax.vmap` of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def over_rows(function: Callable[..., Any], of: int | None = None) -> Callable[..., Any]:
    """A function of arrays with a leading row axis, for one row; `vmap` makes more rows of it.

    Args:
        function: takes a number of rows, then arrays or trees of them. Its results' shapes, but for
            the leading axis, may not depend on the number: a program is traced for one row, then
            mapped.
        of: which argument's rows are counted, those that differ; all rows where left out.
    """

    def counted(count: int) -> Callable[..., Any]:
        @custom_vmap
        def rows(*given):
            every = len(jax.tree.leaves(given)[0])
            return function(every if of is None else count, *given)

        @rows.def_vmap
        def _(size, batched, *given):  # pyright: ignore[reportUnusedFunction]
            def merge(array, mapped):
                if not mapped:
                    array = jnp.broadcast_to(array, (size, *array.shape))
                return array.reshape(-1, *array.shape[2:])

            more = counted(count * size if of is None or batched[of] else count)
            out = more(*jax.tree.map(merge, given, tuple(batched)))
            split = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), out)
            return split, jax.tree.map(lambda _: True, split)

        return rows

    def one(*given):
        found = counted(1)(*jax.tree.map(lambda array: array[None], given))
        return jax.tree.map(lambda array: array[0], found)

    return one
