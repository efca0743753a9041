r"""One head of the filter with rates per key: the kernel forward, its gradient in XLA.

In the notation of `kernels.reverse`, a chunk of 64 tokens is made of its states and rates by
bilinear forms alone (`_made`): G and A, the joint covariances of values with values and with
read-outs, F = ε∘E, and the means that are expected. What the forward pass has left, u, w and
√s, gives the factor without another factorisation,

$$ L_{ts} = k_t^\top \mathrm{diag}(\rho_{ts}) u_s,\quad
   R_{ts} = x_t^\top \mathrm{diag}(\rho_{ts}) u_s $$
$$ B = L^{-\top}(\epsilon\circ U),\quad \Theta = L^{-\top} W $$

and the cotangents of those forms are `kernels.reverse`'s Ĝ, H̄, F̄ and V̄. Their own derivatives are
JAX's. Only the recursion across chunks, four products of K × K a chunk, is sequential.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from layers.chunks import (
    Decay,
    accumulated,
    decayed_products,
    decayed_sums,
    from_start,
    to_end,
    whole,
    within_chunk,
)

from .forward import CHUNK, split
from .head import Filtered, Head, over_rows
from .keywise import filter_keywise, prepare
from .keywise_reverse import recur
from .local import local_of_factors
from .matrices import PIECES, Numbers

AT_ONCE = 8
"""Chunks of every head whose rates, a number for each pair of tokens and key, exist together."""


def filter_keywise_head(head: Head, values: int, interpret: bool = False) -> Filtered:
    """Filter one head of 64 keys and values, of which `values` are seen, in float32."""
    filtered: Any = _filter_head(head, values, interpret)
    return filtered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _filter_head(head: Head, values: int, interpret: bool) -> Filtered:
    return _run(head, values, interpret, save=False)[0]


def _run(head: Head, values: int, interpret: bool, save: bool):
    def rows(number: int, head: Head):
        prepared = prepare(head.key, head.query, head.log_decay, head.starts, head.added)
        states = head.covariance, head.mean
        return filter_keywise(
            prepared, head.value, head.noise, *states, save=save, interpret=interpret
        )

    found = over_rows(rows)(head)
    surprise = found["whitened"][:, head.key.shape[-1] :]
    log_scale = jnp.log(found["inverse_deviation"]) - 0.5 * jnp.log(2 * jnp.pi)
    evidence = values * log_scale - 0.5 * jnp.sum(surprise**2, axis=-1)
    last = found["last_covariance"], found["last_mean"]
    return Filtered(found["mean"], found["variance"], evidence, *last), found


def _forward(head: Head, values: int, interpret: bool):
    out, found = _run(head, values, interpret, save=True)
    kept = {name: found[name] for name in ("whitened", "inverse_deviation", "covariances", "means")}
    return out, (head, kept, out.last_covariance, out.last_mean)


class _Tokens(NamedTuple):
    """A chunk's inputs that have rates; with a leading axis, every chunk's."""

    key: Array
    query: Array
    log_decay: Array
    starts: Array
    added: Array

    def decay(self) -> Decay:
        return within_chunk(self.log_decay, self.starts)


def _factors(tokens: _Tokens, whitened: Array) -> tuple[Array, ...]:
    """k̃, x̃, α_C, L and R of a chunk, and ε∘U beside W."""
    decay, width = tokens.decay(), tokens.key.shape[-1]
    moved, surprise = whitened[:, :width], whitened[:, width:]
    return (
        from_start(tokens.key, decay),
        from_start(tokens.query, decay),
        jnp.broadcast_to(whole(decay, moved), (width,)),
        decayed_products(tokens.key, moved, decay),
        decayed_products(tokens.query, moved, decay),
        jnp.concatenate([to_end(moved, decay), surprise], axis=-1),
    )


def _of_drift(
    tokens: _Tokens, of_variance, joint, read, of_key, of_query, of_end, of_drift_end, at_end
) -> tuple[Array, ...]:
    """Cotangents of a chunk's keys, queries, log decays and added variances."""
    key, query, decay = tokens.key, tokens.query, tokens.decay()
    drift, of_accumulated = jax.vjp(lambda added: accumulated(added, decay), tokens.added)

    def asked(weights, rows):
        (found,) = jax.vjp(lambda tied: decayed_sums(weights, tied, decay), key)[1](rows)
        return found

    tied = asked(joint, key) + asked(read, query) + to_end(of_end, decay)
    of_variance = of_variance[:, None]
    of_key = from_start(of_key, decay) + decayed_sums(joint, drift * key, decay) + drift * tied
    of_query = from_start(of_query, decay) + decayed_sums(read, drift * key, decay)
    of_query = of_query + 2 * of_variance * drift * query
    of_drift = key * tied + of_variance * query**2
    (of_added,) = of_accumulated(of_drift.at[-1].add(of_drift_end))
    moved = key * of_key + query * of_query - 2 * tokens.added * of_added
    of_log_decay = jnp.flip(jnp.cumsum(jnp.flip(moved, 0), axis=0), 0) + at_end
    return of_key, of_query, jnp.where(tokens.starts[:, None], 0, of_log_decay), of_added


def _reverse_rows(values: int, interpret: bool, number: int, given: dict[str, Any], lasts):
    del number
    tokens = (split(given[name], PIECES) for name in ("key", "query"))
    numbers = Numbers(**{name: given[name] for name in Numbers._fields[:-1]}).by_chunk()
    told = given["of_mean"], numbers
    factors = given["joint"], given["asked"]
    found = local_of_factors(factors, given["moved"], *told, values=values, interpret=interpret)
    states = given["means"], given["covariances"]
    got = recur(*tokens, *told, found, *states, *lasts, interpret=interpret)
    return got | {"read": found[2].astype(jnp.float32).sum(axis=2)}


def _backward(values: int, interpret: bool, residuals, of: Filtered):
    head, kept, last_covariance, last_mean = residuals

    def by_chunk(array):
        return array.reshape(-1, CHUNK, *array.shape[1:])

    def by_token(array):
        return array.reshape(-1, *array.shape[2:])

    def over_chunks(function, *arrays):
        return jax.lax.map(lambda chunk: function(*chunk), arrays, batch_size=AT_ONCE)

    tokens = _Tokens(
        *map(by_chunk, (head.key, head.query, head.log_decay, head.starts, head.added))
    )
    key, query, fade, joint, asked, moved = over_chunks(
        _factors, tokens, by_chunk(kept["whitened"])
    )
    zero = jnp.zeros_like(of.variance)
    given = {
        "key": by_token(key),
        "query": by_token(query),
        "joint": joint,
        "asked": asked,
        "moved": by_token(moved),
        "of_mean": of.mean,
        **dict.fromkeys(("total", "document", "drift", "end"), zero),
        "alpha": fade.reshape(-1),
        "of_variance": of.variance,
        "of_evidence": of.log_evidence,
        **{name: kept[name] for name in ("inverse_deviation", "means", "covariances")},
    }
    of_lasts = of.last_mean, (of.last_covariance + of.last_covariance.T) / 2
    found = over_rows(partial(_reverse_rows, values, interpret), of=0)(given, of_lasts)
    of_last_mean, of_last_covariance = of_lasts
    means = kept["means"].astype(jnp.float32).sum(axis=1)
    scale = jnp.sum(means * found["means"], axis=-2) + found["scale"]
    at_last = jnp.sum(last_mean * of_last_mean, axis=0)
    at_last = at_last + 2 * jnp.sum(last_covariance * of_last_covariance, axis=0)

    def at_ends(starts: Array, last: Array) -> Array:
        return jnp.append(starts[1:], last[None], axis=0)

    of_key, of_query, of_log_decay, of_added = over_chunks(
        _of_drift,
        tokens,
        by_chunk(of.variance),
        found["joint"],
        found["read"],
        *(by_chunk(found[name]) for name in ("key", "query", "ends")),
        at_ends(found["trace"], jnp.diagonal(of_last_covariance)),
        at_ends(scale, at_last),
    )
    return (
        Head(
            by_token(of_key),
            found["value"],
            by_token(of_query),
            found["noise"],
            by_token(of_log_decay),
            None,  # type: ignore[arg-type]
            by_token(of_added),
            found["first_covariance"],
            found["means"][0],
        ),
    )


_filter_head.defvjp(_forward, _backward)
