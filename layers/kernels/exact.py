"""The exact filter of one head by kernels, with gradients; heads are mapped onto programs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import blocks, devices, restored, reverse, segments, wide
from .blocks import drift_since, kept_sums, rates, ratios_within, sums, unknown
from .forward import CHUNK, WIDTH, filter_blocks, split
from .head import Filtered, Head, over_rows
from .local import local
from .matrices import PIECES, Numbers

_LASTS, _FIRSTS = ("last_covariance", "last_mean"), ("first_covariance", "first_mean")
_KEPT = ("whitened", "inverse_deviation", "covariances", "means", "loops")


def filter_head(
    head: Head,
    values: int = WIDTH,
    interpret: bool = False,
    whole: bool = True,
    axis: str | None = None,
) -> Filtered:
    """Filter one head.

    Args:
        head: values 64 wide, and keys 64 or 128.
        values: how many of a token's 64 values are seen; the others are 0 and no evidence.
        interpret: whether kernels are simulated on a CPU.
        whole: whether the sequence is never cut into segments; with keys of 128, and where
            a restoration keeps less than all, it must not be.
        axis: mesh axis whose devices hold parts of the sequence in order, inside `jax.shard_map`.
            The belief before the first token is then that of the first part, the last belief that
            after the device's own; a sequence that must be whole is held by one device.
    """
    filtered: Any = _filter_head(head, values, interpret, whole, axis)
    return filtered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _filter_head(
    head: Head, values: int, interpret: bool, whole: bool, axis: str | None
) -> Filtered:
    return _run(head, values, interpret, whole, axis, False)[0]


# A program of its own, so that layers that are alike share their kernels: each is lowered once.
@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _run(
    head: Head, values: int, interpret: bool, whole: bool, axis: str | None, save: bool
) -> tuple[Filtered, dict[str, Any]]:
    chunks, split_up, tree = len(head.key) // CHUNK, None, axis is not None
    if axis is not None:
        head, split_up = devices.enter(head, axis, interpret)

    def rows(number: int, head: Head, split_up: devices.Parts | None):
        numbers = rates(head.noise, head.log_decay, head.starts, head.added, head.kept)
        covariance, mean = head.covariance, head.mean
        parts = 1 if whole else segments.count(number, chunks, tree=tree)
        loops = segments.no_loops(number)
        if split_up is not None:
            covariance, mean = segments.begun(
                split_up.until, covariance, mean, parts, interpret=interpret
            )
            if save:
                loops = segments.loops_of(split_up.each, covariance, mean, interpret=interpret)
        elif parts > 1:
            covariance, mean, loops = segments.starts(
                head.key, head.value, numbers, covariance, mean, parts, interpret=interpret
            )
        cut = partial(segments.cut, segments=parts)
        found: dict[str, Any] = filter_blocks(
            cut(head.key),
            cut(head.value),
            cut(head.query),
            jax.tree.map(cut, numbers),
            covariance.reshape(-1, *covariance.shape[-2:]),
            mean.reshape(-1, *mean.shape[-2:]),
            save=save,
            interpret=interpret,
        )
        lasts = {name: found.pop(name)[parts - 1 :: parts] for name in _LASTS}
        found = {name: segments.join(part, parts) for name, part in found.items()} | lasts
        cuttable = tree or segments.most(chunks) >= segments.FEWEST
        if save and not whole and cuttable:
            found["loops"] = segments.filled(loops, chunks, tree=tree)
        return found

    found = over_rows(rows)(head, split_up)
    surprise = found["whitened"][:, head.key.shape[-1] :]
    scale = found["inverse_deviation"]
    log_scale = jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)
    evidence = values * log_scale - 0.5 * jnp.sum(surprise**2, axis=-1)
    out = Filtered(
        found["mean"], found["variance"], evidence, found["last_covariance"], found["last_mean"]
    )
    return out, found


def _forward(head: Head, values: int, interpret: bool, whole: bool, axis: str | None):
    out, found = _run(head, values, interpret, whole, axis, True)
    kept = {name: found[name] for name in _KEPT if name in found}
    return out, (head, kept, out.last_covariance, out.last_mean)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(values: int, interpret: bool, whole: bool, axis: str | None, residuals, of: Filtered):
    head, kept, last_covariance, last_mean = residuals
    total, document = sums(unknown(head.log_decay), head.starts, CHUNK)
    ratios = ratios_within(total, document)
    by_block = rates(head.noise, head.log_decay, head.starts, head.added, head.kept)
    faded = None if head.kept is None else kept_sums(head.kept, CHUNK)
    alpha = jnp.where(document == 0, jnp.exp(total), 0)
    of_lasts = of.last_mean, (of.last_covariance + of.last_covariance.T) / 2
    numbers = Numbers(
        total.reshape(-1),
        document.reshape(-1),
        alpha.reshape(-1),
        drift_since(by_block, CHUNK),
        ratios[:, -1].reshape(-1),
        of.variance,
        of.log_evidence,
        kept["inverse_deviation"],
        None if faded is None else faded.reshape(-1),
    )
    given = {
        **kept,
        "key": head.key,
        "query": head.query,
        "of_mean": of.mean,
        **{name: part for name, part in numbers._asdict().items() if part is not None},
    }
    whitened = given.pop("whitened")
    if axis is not None:
        ask = over_rows(partial(_ask_rows, values, interpret), of=0)
        given["local"], given["asked"] = asked = ask(whitened, given)
        own = jax.tree.map(lambda part: part[0], asked[1])
        of_lasts = devices.leave(own, *of_lasts, axis)
    reverse_rows = over_rows(partial(_reverse_rows, values, interpret, whole), of=0)
    found = reverse_rows(whitened, given, of_lasts)
    first_covariance, first_mean = (found[name] for name in _FIRSTS)
    if axis is not None:
        first_covariance = devices.of_first(first_covariance, axis)
        first_mean = devices.of_first(first_mean, axis)
    of_last_mean, of_last_covariance = of_lasts

    def at_ends(starts: Array, last: Array) -> Array:
        return jnp.append(jnp.sum(starts, axis=-1)[1:], last)

    of_drift = found["drift"].reshape(-1, CHUNK)
    of_drift = of_drift.at[:, -1].add(at_ends(found["trace"], jnp.trace(of_last_covariance)))
    of_added = blocks.of_added(by_block, of_drift)
    at_last = jnp.sum(last_mean * of_last_mean)
    at_last = at_last + 2 * jnp.sum(last_covariance * of_last_covariance)
    moved = found["moved"].reshape(-1, CHUNK) - 2 * head.added.reshape(-1, CHUNK) * of_added
    since = jnp.flip(jnp.cumsum(jnp.flip(moved, -1), axis=-1), -1)
    of_log_decay = (since + at_ends(found["scale"], at_last)[:, None]).reshape(-1)
    of_kept = None
    if faded is not None:
        of_kept = restored.of_kept(head, found, numbers, of_added)
    return (
        Head(
            found["key"],
            found["value"].astype(head.value.dtype),
            found["query"],
            found["noise"],
            jnp.where(head.starts, 0, of_log_decay),
            None,  # type: ignore[arg-type]
            of_added.reshape(-1),
            first_covariance,
            first_mean,
            of_kept,
        ),
    )


def _questions(
    values: int, interpret: bool, parts: int, whitened: Array, given: dict[str, Any]
) -> tuple[Any, ...]:
    """What `reverse.recur` and `sweep` take of segments, cotangents of their ends aside."""

    def cut(name: str) -> Any:
        return segments.cut(given[name], parts) if name in given else None

    key, of_mean = cut("key"), cut("of_mean")
    depth = 1 if key.dtype == jnp.bfloat16 else PIECES
    tokens = split(key, depth), split(cut("query"), depth)
    numbers = Numbers(**{name: cut(name) for name in Numbers._fields})
    by_chunk = numbers.by_chunk()
    if "local" in given:
        found = tuple(segments.cut(part, parts) for part in given["local"])
    else:
        whitened = segments.cut(whitened, parts)
        found = local(*tokens, whitened, of_mean, by_chunk, values=values, interpret=interpret)
    return *tokens, of_mean, by_chunk, found


def _ask_rows(values: int, interpret: bool, number: int, whitened: Array, given: dict[str, Any]):
    chunks = whitened.shape[1] // CHUNK
    parts = segments.count(number, chunks, tree=True)
    asked = _questions(values, interpret, parts, whitened, given)
    from_each = segments.asked_from(asked, given["loops"], parts, interpret=interpret)
    joined = tuple(segments.join(part, parts) for part in asked[-1])
    return joined, segments.filled(from_each, chunks, tree=True)


def _reverse_rows(
    values: int,
    interpret: bool,
    whole: bool,
    number: int,
    whitened: Array,
    given: dict[str, Any],
    lasts: tuple[Array, Array],
):
    key, tree = given["key"], "asked" in given
    parts = 1 if whole else segments.count(number, key.shape[1] // CHUNK, tree=tree)
    asked = _questions(values, interpret, parts, whitened, given)
    if tree:
        lasts = segments.ends_from(given["asked"], *lasts, parts)
    elif "loops" in given and parts > 1:
        lasts = segments.ends(asked, given["loops"], *lasts, parts, interpret=interpret)
    means, covariances = (segments.cut(given[name], parts) for name in ("means", "covariances"))
    recur: Any = reverse.recur if key.shape[-1] == WIDTH else wide.recur
    got = recur(*asked, means, covariances, *lasts, dtype=key.dtype, interpret=interpret)
    if "faded" in given:
        key, query, _, numbers, _ = asked
        left = whitened, got.pop("tied"), got.pop("ends")
        got |= restored.asked(key, query, *left, numbers, interpret=interpret)
    firsts = {name: got.pop(name)[::parts] for name in _FIRSTS}
    return {name: segments.join(part, parts) for name, part in got.items()} | firsts


_filter_head.defvjp(_forward, _backward)
