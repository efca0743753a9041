"""The exact filter of one head by kernels, with gradients; heads are mapped onto programs."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from . import reverse, segments, wide
from .blocks import kept_sums, kept_within, rates, ratios_within, sums, unknown
from .forward import CHUNK, WIDTH, filter_blocks, split
from .restored import of_kept as cotangent_of_kept

_LASTS, _FIRSTS = ("last_covariance", "last_mean"), ("first_covariance", "first_mean")
_KEPT = ("whitened", "inverse_deviation", "covariances", "means", "loops")


class Head(NamedTuple):
    """What one head filters; time is a multiple of 64.

    Args:
        key: bfloat16 or float32, as are values and queries.
        value: what is written.
        query: what is read.
        noise: r.
        log_decay: of memory and standard deviation alike.
        starts: where documents start.
        added: variance before the write: drift, or all of it where a document starts.
        covariance: P before the first token.
        mean: M before the first token.
        kept: λ of a restoration, or None: what the prediction keeps of a² P, to which `added` is
            added.
    """

    key: Float[Array, "time key"]
    value: Float[Array, "time value"]
    query: Float[Array, "time key"]
    noise: Float[Array, " time"]
    log_decay: Float[Array, " time"]
    starts: Bool[Array, " time"]
    added: Float[Array, " time"]
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
        function: takes a number of rows, then arrays. Its results' shapes, but for the leading
            axis, may not depend on the number: a program is traced for one row, then mapped.
        of: which argument's rows are counted, those that differ; all rows where left out.
    """

    def counted(count: int) -> Callable[..., Any]:
        @custom_vmap
        def rows(*arrays):
            return function(len(arrays[0]) if of is None else count, *arrays)

        @rows.def_vmap
        def _(size, batched, *arrays):  # pyright: ignore[reportUnusedFunction]
            def merge(array, mapped):
                if not mapped:
                    array = jnp.broadcast_to(array, (size, *array.shape))
                return array.reshape(-1, *array.shape[2:])

            more = counted(count * size if of is None or batched[of] else count)
            out = more(*map(merge, arrays, batched))
            split = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), out)
            return split, jax.tree.map(lambda _: True, split)

        return rows

    def one(*arrays):
        found = counted(1)(*(array[None] for array in arrays))
        return jax.tree.map(lambda array: array[0], found)

    return one


def filter_head(
    head: Head, values: int = WIDTH, interpret: bool = False, whole: bool = True
) -> Filtered:
    """Filter one head.

    Args:
        head: values 64 wide, and keys 64 or 128.
        values: how many of a token's 64 values are seen; the others are 0 and no evidence.
        interpret: whether kernels are simulated on a CPU.
        whole: whether the sequence is never cut into segments; with keys of 128, and where
            a restoration keeps less than all, it must not be.
    """
    filtered: Any = _filter_head(head, values, interpret, whole)
    return filtered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _filter_head(head: Head, values: int, interpret: bool, whole: bool) -> Filtered:
    return _run(head, values, interpret, whole, save=False)[0]


def _run(
    head: Head, values: int, interpret: bool, whole: bool, save: bool
) -> tuple[Filtered, dict[str, Array]]:
    chunks = len(head.key) // CHUNK

    def rows(number, key, value, query, noise, log_decay, starts, added, *states):
        covariance, mean, *kept = states
        numbers = rates(noise, log_decay, starts, added, *kept)
        parts, loops = 1 if whole else segments.count(number, chunks), None
        if parts > 1:
            covariance, mean, loops = segments.starts(
                key, value, numbers, covariance, mean, parts, interpret=interpret
            )
        cut = partial(segments.cut, segments=parts)
        found = filter_blocks(
            cut(key),
            cut(value),
            cut(query),
            jax.tree.map(cut, numbers),
            covariance.reshape(-1, *covariance.shape[-2:]),
            mean.reshape(-1, *mean.shape[-2:]),
            save=save,
            interpret=interpret,
        )
        lasts = {name: found.pop(name)[parts - 1 :: parts] for name in _LASTS}
        found = {name: segments.join(part, parts) for name, part in found.items()} | lasts
        if save and not whole and segments.most(chunks) >= segments.FEWEST:
            found["loops"] = segments.filled(loops, number, chunks)
        return found

    found = over_rows(rows)(*(part for part in head if part is not None))
    surprise = found["whitened"][:, head.key.shape[-1] :]
    scale = found["inverse_deviation"]
    log_scale = jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)
    evidence = values * log_scale - 0.5 * jnp.sum(surprise**2, axis=-1)
    out = Filtered(
        found["mean"], found["variance"], evidence, found["last_covariance"], found["last_mean"]
    )
    return out, found


def _forward(head: Head, values: int, interpret: bool, whole: bool):
    out, found = _run(head, values, interpret, whole, save=True)
    kept = {name: found[name] for name in _KEPT if name in found}
    return out, (head, kept, out.last_covariance, out.last_mean)


def _backward(values: int, interpret: bool, whole: bool, residuals, of: Filtered):
    head, kept, last_covariance, last_mean = residuals
    total, document = sums(unknown(head.log_decay), head.starts, CHUNK)
    ratios = ratios_within(total, document)
    added, squared = head.added.reshape(-1, CHUNK), ratios**2
    faded = None
    if head.kept is not None:
        faded = kept_sums(head.kept, CHUNK)
        squared = squared * kept_within(faded)
    drift = jnp.sum(squared * added[:, None], axis=-1)
    alpha = jnp.where(document == 0, jnp.exp(total), 0)
    of_last_covariance = (of.last_covariance + of.last_covariance.T) / 2
    numbers = reverse.Numbers(
        total.reshape(-1),
        document.reshape(-1),
        alpha.reshape(-1),
        drift.reshape(-1),
        ratios[:, -1].reshape(-1),
        of.variance,
        of.log_evidence,
        kept["inverse_deviation"],
        None if faded is None else faded.reshape(-1),
    )
    arrays = {
        **kept,
        "key": head.key,
        "query": head.query,
        "of_mean": of.mean,
        "of_last_mean": of.last_mean,
        "of_last_covariance": of_last_covariance,
        **{name: part for name, part in numbers._asdict().items() if part is not None},
    }
    names = tuple(arrays)
    rows = partial(_reverse_rows, names, values, interpret, whole)
    found = over_rows(rows, of=names.index("whitened"))(*arrays.values())

    def at_ends(starts: Array, last: Array) -> Array:
        return jnp.append(jnp.sum(starts, axis=-1)[1:], last)

    of_drift = found["drift"].reshape(-1, CHUNK)
    of_drift = of_drift.at[:, -1].add(at_ends(found["trace"], jnp.trace(of_last_covariance)))
    of_added = jnp.sum(of_drift[:, :, None] * squared, axis=1)
    at_last = jnp.sum(last_mean * of.last_mean)
    at_last = at_last + 2 * jnp.sum(last_covariance * of_last_covariance)
    moved = found["moved"].reshape(-1, CHUNK) - 2 * added * of_added
    since = lax.cumsum(moved, axis=1, reverse=True)
    of_log_decay = (since + at_ends(found["scale"], at_last)[:, None]).reshape(-1)
    of_kept = None
    if faded is not None:
        of_kept = cotangent_of_kept(head, kept, found, numbers, ratios, of_added)
    return (
        Head(
            found["key"],
            found["value"].astype(head.value.dtype),
            found["query"],
            found["noise"],
            jnp.where(head.starts, 0, of_log_decay),
            None,  # type: ignore[arg-type]
            of_added.reshape(-1),
            found["first_covariance"],
            found["first_mean"],
            of_kept,
        ),
    )


def _reverse_rows(
    names: tuple[str, ...], values: int, interpret: bool, whole: bool, number: int, *arrays: Array
):
    given = dict(zip(names, arrays, strict=True))
    key, lasts = given["key"], (given.pop("of_last_mean"), given.pop("of_last_covariance"))
    loops = given.pop("loops", None)
    parts = 1 if whole else segments.count(number, key.shape[1] // CHUNK)
    here = SimpleNamespace(**{name: segments.cut(part, parts) for name, part in given.items()})
    depth = 1 if key.dtype == jnp.bfloat16 else reverse.PIECES
    parts_of: Any = {name: getattr(here, name, None) for name in reverse.Numbers._fields}
    numbers = reverse.Numbers(**parts_of)
    tokens = split(here.key, depth), split(here.query, depth)
    by_chunk = numbers.by_chunk()
    found = reverse.local(
        *tokens, here.whitened, here.of_mean, by_chunk, values=values, interpret=interpret
    )
    asked = *tokens, here.of_mean, by_chunk, found
    if loops is not None and parts > 1:
        lasts = segments.ends(asked, loops, *lasts, parts, interpret=interpret)
    recur = reverse.recur if key.shape[-1] == WIDTH else wide.recur
    got = recur(*asked, here.means, here.covariances, *lasts, dtype=key.dtype, interpret=interpret)
    firsts = {name: got.pop(name)[::parts] for name in _FIRSTS}
    return {name: segments.join(part, parts) for name, part in got.items()} | firsts


_filter_head.defvjp(_forward, _backward)
