r"""Every rule token by token, in one `lax.scan`: the definition that all other forms must equal.

$$ P^- = \mathrm{rule}(P),\quad s = k^\top P^- k + r,\quad g = P^- k / s,\quad
   M = M^- + (v - M^- k) g^\top,\quad P = P^- - s g g^\top,\quad y = M x,\quad x^\top P x $$

Also how a memory decodes: `token_step` is one step of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .precision import exact_product
from .rules import Additive, Diagonal, Exact, Forget, Isotropic, Reset, Restored, Rule
from .stream import Belief, Reading, Stream

Scalar = Float[Array, ""]


def token_scan(
    stream: Stream, initial: Belief, prior: Belief, rule: Rule
) -> tuple[Belief, Reading]:
    """Belief after the last token, and every token's reading; one write a token."""

    def body(belief, token):
        return token_step(belief, token, prior, rule)

    return jax.lax.scan(body, initial, _with_restoration(stream, rule))


def _with_restoration(stream: Stream, rule: Rule) -> tuple[Stream, Array | None]:
    if not isinstance(rule, Restored):
        return stream, None
    return stream, jnp.broadcast_to(rule.restoration, (stream.length,))


def token_step(
    belief: Belief, token: tuple[Stream, Array | None], prior: Belief, rule: Rule
) -> tuple[Belief, Reading]:
    """One token: time passes, the value is absorbed, the query is read.

    Args:
        belief: before the token.
        token: its stream without a time axis, and its restoration where the rule is `Restored`.
        prior: what a document starts from.
        rule: what is done to the covariance.
    """
    u, restoration = token
    if u.starts is not None:
        belief = jax.tree.map(lambda old, new: jnp.where(u.starts, new, old), belief, prior)
    decay = jnp.ones((), u.key.dtype) if u.log_decay is None else jnp.exp(u.log_decay)
    drift = jnp.zeros((), u.key.dtype) if u.drift is None else u.drift
    mean = belief.mean * decay
    if isinstance(rule, Additive):
        return _add(u, Belief(mean, belief.covariance), decay, drift)
    mean, covariance = _predict(Belief(mean, belief.covariance), prior, u, decay, drift, rule)
    if isinstance(rule, Restored):
        assert restoration is not None
        covariance = restoration * covariance
        covariance += (1 - restoration) * rule.variance * jnp.eye(len(covariance))
    width = u.key.shape[-1]
    square = covariance if covariance.ndim == 2 else covariance * jnp.eye(width)
    projected = exact_product(square, u.key)
    innovation_variance = projected @ u.key + u.noise
    gain = projected / innovation_variance
    innovation = u.value - mean @ u.key
    mean = mean + innovation[:, None] * gain
    square = square - innovation_variance * gain[:, None] * gain
    after = _conclude(rule, covariance, square, u)
    read = square if after is None or after.ndim == 2 else after * jnp.eye(width)
    variance = u.query @ exact_product(read, u.query)
    reading = Reading(mean @ u.query, variance, log_density(innovation, innovation_variance))
    return Belief(mean, after), reading


def _predict(belief: Belief, prior: Belief, u: Stream, decay, drift, rule: Rule):
    """Mean and covariance before the write."""
    width = u.key.shape[-1]
    covariance, identity = belief.covariance, jnp.eye(width, dtype=u.key.dtype)
    match rule:
        case Reset(variance):
            return belief.mean, variance * identity
        case Diagonal():
            return belief.mean, decay**2 * covariance + drift
        case Isotropic():
            return belief.mean, jnp.mean(decay**2) * covariance + jnp.mean(drift)
    outer = jnp.broadcast_to(decay, (width,))
    covariance = outer[:, None] * covariance * outer + identity * drift
    if isinstance(rule, Forget):
        kept = u.rate * jnp.linalg.inv(covariance)
        restored = (1 - u.rate) * jnp.linalg.inv(prior.covariance)
        covariance = jnp.linalg.inv(kept + restored)
        information = belief.mean @ kept + prior.mean @ restored
        return information @ covariance, covariance
    return belief.mean, covariance


def _conclude(rule: Rule, prepared: Array, posterior: Array, u: Stream) -> Array | None:
    """The covariance carried on."""
    width = u.key.shape[-1]
    match rule:
        case Reset():
            return None
        case Diagonal(count):
            return 1 / (1 / prepared + (count or width) * u.key**2 / u.noise)
        case Isotropic(count):
            return 1 / (1 / prepared + (count or width) * jnp.mean(u.key**2) / u.noise)
        case _:
            return posterior


def _add(u: Stream, predicted: Belief, decay, drift) -> tuple[Belief, Reading]:
    mean = predicted.mean + u.value[:, None] * u.key
    kept = drift * u.noise / (drift + u.noise) if u.drift is not None else 0.0
    variance = decay**2 * predicted.covariance + kept
    read = jnp.sum(variance * u.query**2)
    return Belief(mean, variance), Reading(mean @ u.query, read, jnp.zeros_like(read))


def log_density(innovation: Float[Array, "*time value"], variance: Float[Array, "*time"]) -> Array:
    """Log density of an innovation whose entries have one variance."""
    count = innovation.shape[-1]
    squares = jnp.sum(innovation**2, axis=-1) / variance
    return -0.5 * (squares + count * jnp.log(2 * jnp.pi * variance))
