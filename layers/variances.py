r"""Variances of the diagonal and isotropic policies, parallel in time.

A prediction and an update take one variance p to $(a^2 p + q)/(1 + \kappa(a^2 p + q))$, a Möbius
map. Maps compose like 2×2 matrices, whose entries are all positive here, so nothing cancels; each
product is divided by its largest entry.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .stream import Belief, Stream, per_key

Variances = Float[Array, "time width"]


def diagonal_variances(
    stream: Stream, initial: Belief, prior: Belief, count: float | None
) -> tuple[Variances, Variances]:
    """Variances per key before and after each write, under `Diagonal`."""
    count = stream.key.shape[-1] if count is None else count
    information = count * stream.key**2 / stream.noise[:, None]
    decay, drift = _rates(stream)
    return moebius_scan(decay**2, drift, information, stream.starts, initial, prior)


def isotropic_variances(
    stream: Stream, initial: Belief, prior: Belief, count: float | None
) -> tuple[Variances, Variances]:
    """The one variance, (time, 1), before and after each write, under `Isotropic`."""
    count = stream.key.shape[-1] if count is None else count
    information = count * jnp.mean(stream.key**2, axis=-1, keepdims=True) / stream.noise[:, None]
    decay, drift = _rates(stream)
    decay = jnp.mean(decay**2, axis=-1, keepdims=True)
    drift = jnp.mean(drift, axis=-1, keepdims=True)
    return moebius_scan(decay, drift, information, stream.starts, initial, prior)


def _rates(stream: Stream) -> tuple[Float[Array, "time _"], Float[Array, "time _"]]:
    one = jnp.ones((stream.length, 1), stream.key.dtype)
    decay = one if stream.log_decay is None else jnp.exp(per_key(stream.log_decay))
    return decay, 0 * one if stream.drift is None else per_key(stream.drift)


def moebius_scan(squared, drift, information, starts, initial: Belief, prior: Belief):
    """Variances before and after every write of p ← a²p + q, then 1/p ← 1/p + information."""
    assert initial.covariance is not None
    squared, drift, information = jnp.broadcast_arrays(squared, drift, information)
    first = jnp.broadcast_to(initial.covariance, squared.shape[1:])
    if starts is not None:
        assert prior.covariance is not None
        starts = starts[:, None]
        drift = jnp.where(starts, squared * prior.covariance + drift, drift)
        squared = jnp.where(starts, 0, squared)
    rows = (squared, drift), (information * squared, 1 + information * drift)
    matrices = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)

    def combine(first, second):
        product = jnp.sum(second[..., :, :, None] * first[..., None, :, :], axis=-2)
        # The lower right entry is at least its own drift's share: never all zero.
        largest = jnp.max(product, axis=(-2, -1), keepdims=True)
        return product / jax.lax.stop_gradient(largest)

    maps = jax.lax.associative_scan(combine, matrices)
    above = maps[..., 0, 0] * first + maps[..., 0, 1]
    after = above / (maps[..., 1, 0] * first + maps[..., 1, 1])
    before = squared * jnp.concatenate([first[None], after[:-1]]) + drift
    return before, after
