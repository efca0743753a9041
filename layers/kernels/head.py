"""One head, as kernels filter it, and how `jax.vmap` makes rows of heads, each a program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float


class Head(NamedTuple):
    """What one head filters; time is a multiple of 64.

    Args:
        key: bfloat16 or float32, as are values and queries.
        value: what is written.
        query: what is read.
        noise: r.
        log_decay: of memory and standard deviation alike; one number, or one a key.
        starts: where documents start.
        added: variance before the write: drift, or all of it where a document starts; one number,
            or one a key.
        covariance: P before the first token.
        mean: M before the first token.
        kept: λ of a restoration, or None: what the prediction keeps of a² P, to which `added` is
            added.
    """

    key: Float[Array, "time key"]
    value: Float[Array, "time value"]
    query: Float[Array, "time key"]
    noise: Float[Array, " time"]
    log_decay: Float[Array, "time ..."]
    starts: Bool[Array, " time"]
    added: Float[Array, "time ..."]
    covariance: Float[Array, "key key"]
    mean: Float[Array, "value key"]
    kept: Float[Array, " time"] | None = None


class Filtered(NamedTuple):
    """What a head says at each token, and its last belief."""

    mean: Float[Array, "time value"]
    variance: Float[Array, " time"]
    log_evidence: Float[Array, " time"]
    last_covariance: Float[Array, "key key"]
    last_mean: Float[Array, "value key"]


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
