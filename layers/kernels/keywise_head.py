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
    accumulated,
    decayed_products,
    from_start,
    to_end,
    whole,
    within_chunk,
)
from layers.precision import exact_product
from layers.triangular import triangular_inverse

from .forward import CHUNK
from .head import Filtered, Head, over_rows
from .keywise import filter_keywise, prepare

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
    return out, (head, kept)


class _Tokens(NamedTuple):
    """A chunk's inputs; with a leading axis, every chunk's."""

    key: Array
    value: Array
    query: Array
    log_decay: Array
    added: Array


class _Known(NamedTuple):
    """What a chunk knows of itself before cotangents of its end are known."""

    inverse: Array  # L⁻¹
    read: Array  # R
    weights: Array  # B
    explained: Array  # Θ
    of_surprise: Array  # W̄
    of_read: Array  # R̄
    closed: Array  # Ψ
    seen: Array  # Λ
    of_mean: Array  # what its own readings ask of M
    of_covariance: Array  # and of P


def _made(tokens: _Tokens, starts, covariance, mean):
    """A chunk's joint covariances, expected means, and what its end is without its values."""
    decay = within_chunk(tokens.log_decay, starts)
    key, query = (from_start(rows, decay) for rows in (tokens.key, tokens.query))
    drift = accumulated(tokens.added, decay)
    carried, drifted = exact_product(key, covariance), drift * tokens.key
    joint = exact_product(carried, key.T) + decayed_products(tokens.key, drifted, decay)
    asked = exact_product(query, carried.T) + decayed_products(tokens.query, drifted, decay)
    end = to_end(from_start(carried, decay) + drifted, decay)
    variance = jnp.sum(exact_product(query, covariance) * query + drift * tokens.query**2, axis=-1)
    kept = whole(decay, covariance)
    return (
        joint,
        asked,
        end,
        tokens.value - exact_product(key, mean.T),
        exact_product(query, mean.T),
        variance,
        mean * kept,
        kept[:, None] * covariance * kept + jnp.diag(drift[-1]),
    )


def _known(
    values: int, tokens: _Tokens, starts, whitened, scale, of_output, of_variance, of_evidence
) -> _Known:
    decay = within_chunk(tokens.log_decay, starts)
    width = tokens.key.shape[-1]
    moved, surprise = whitened[:, :width], whitened[:, width:]
    factor = jnp.tril(decayed_products(tokens.key, moved, decay), -1) + jnp.diag(1 / scale)
    inverse = triangular_inverse(factor)
    read = decayed_products(tokens.query, moved, decay)
    weights = exact_product(inverse.T, to_end(moved, decay))
    explained = exact_product(inverse.T, surprise)
    of_surprise = exact_product(read.T, of_output) - of_evidence[:, None] * surprise
    of_read = jnp.tril(exact_product(of_output, surprise.T) - 2 * of_variance[:, None] * read)
    key, query = (from_start(rows, decay) for rows in (tokens.key, tokens.query))
    closed = jnp.diag(whole(decay, key)) - exact_product(key.T, weights)
    evidence = values * jnp.diag(of_evidence)
    of_joint = _of_joint(inverse, read, surprise, of_surprise, of_read, evidence)
    of_mean = exact_product(of_output.T, query)
    of_mean = of_mean - exact_product(exact_product(inverse.T, of_surprise).T, key)
    crossed = exact_product(of_joint, key)
    crossed = exact_product(key.T, crossed) + exact_product(
        exact_product(query.T, exact_product(of_read, inverse)), key
    )
    squared = exact_product(query.T, of_variance[:, None] * query)
    return _Known(
        inverse,
        read,
        weights,
        explained,
        of_surprise,
        of_read,
        closed,
        exact_product(explained.T, key),
        of_mean,
        (crossed + crossed.T) / 2 + squared,
    )


def _of_joint(inverse, read, surprise, of_surprise, of_read, evidence):
    """Ĝ of a chunk's own readings: the lower triangle, off the diagonal doubled."""
    inner = exact_product(of_surprise, surprise.T) + exact_product(of_read.T, read)
    inner = _halved(inner)
    inner = inner + inner.T + evidence
    return -_halved(exact_product(exact_product(inverse.T, inner), inverse))


def _halved(square):
    """The lower triangle, its diagonal halved."""
    return jnp.tril(square) - jnp.diag(jnp.diagonal(square)) / 2


def _of_chunk(
    values: int, tokens, starts, surprise, known: _Known, states, of_said, of_end
) -> tuple[_Tokens, Array]:
    """Cotangents of a chunk's inputs, and of its noise, given those of its end."""
    of_output, of_variance, of_evidence = of_said
    of_mean_end, of_covariance_end = of_end
    guided = exact_product(known.explained, of_mean_end)
    spread = exact_product(known.weights, of_covariance_end)
    of_value = exact_product(known.inverse.T, known.of_surprise)
    of_value = of_value + exact_product(known.weights, of_mean_end.T)
    of_joint = _of_joint(
        known.inverse,
        known.read,
        surprise,
        known.of_surprise,
        known.of_read,
        values * jnp.diag(of_evidence),
    )
    between = exact_product(guided - spread, known.weights.T)
    of_joint = of_joint - _halved(between + between.T)
    cotangents = (
        of_joint,
        jnp.tril(exact_product(known.of_read, known.inverse)),
        guided - 2 * spread,
        of_value,
        of_output,
        of_variance,
        of_mean_end,
        of_covariance_end,
    )
    _, pull = jax.vjp(lambda tokens: _made(tokens, starts, *states), tokens)
    (of_tokens,) = pull(cotangents)
    return of_tokens, jnp.diagonal(of_joint)


def _backward(values: int, interpret: bool, residuals, of: Filtered):
    del interpret
    head, kept = residuals

    def by_chunk(array):
        return array.reshape(-1, CHUNK, *array.shape[1:])

    def over_chunks(function, *arrays):
        return jax.lax.map(lambda chunk: function(*chunk), arrays, batch_size=AT_ONCE)

    tokens = _Tokens(*map(by_chunk, (head.key, head.value, head.query, head.log_decay, head.added)))
    starts, whitened, scale = map(
        by_chunk, (head.starts, kept["whitened"], kept["inverse_deviation"])
    )
    of_said = tuple(map(by_chunk, (of.mean, of.variance, of.log_evidence)))
    known = over_chunks(partial(_known, values), tokens, starts, whitened, scale, *of_said)
    of_last = (of.last_covariance + of.last_covariance.T) / 2

    def body(of_end, chunk: _Known):
        of_mean, of_covariance = of_end
        turned = exact_product(of_mean, chunk.closed.T)
        carried = exact_product(exact_product(chunk.closed, of_covariance), chunk.closed.T)
        crossed = exact_product(chunk.seen.T, turned)
        of_start = (
            turned + chunk.of_mean,
            carried + (crossed + crossed.T) / 2 + chunk.of_covariance,
        )
        return of_start, of_end

    first, of_ends = jax.lax.scan(body, (of.last_mean, of_last), known, reverse=True)
    states = tuple(kept[name].astype(jnp.float32).sum(axis=1) for name in ("covariances", "means"))
    surprise = whitened[..., head.key.shape[-1] :]
    found, of_noise = over_chunks(
        partial(_of_chunk, values), tokens, starts, surprise, known, states, of_said, of_ends
    )
    key, value, query, log_decay, added = (part.reshape(-1, *part.shape[2:]) for part in found)
    return (
        Head(
            key,
            value,
            query,
            of_noise.reshape(-1),
            log_decay,
            None,  # type: ignore[arg-type]
            added,
            first[1],
            first[0],
        ),
    )


_filter_head.defvjp(_forward, _backward)
