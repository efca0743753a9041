r"""Every rule token by token, in one `lax.scan`: the definition that all other forms must equal.

$$ P^- = \mathrm{rule}(P),\quad s = k^\top P^- k + r,\quad g = P^- k / s,\quad
   M = M^- + (v - M^- k) g^\top,\quad y = M x,\quad x^\top P x,\quad
   P = (I - k g^\top)^\top P^- (I - k g^\top) + r\,g g^\top $$

P is P⁻ − s g gᵀ in Joseph's form, in which an error of g counts by its square: the plain difference
rounds at the size of P⁻, far above P where noise is small.

Also how a memory decodes: `token_step` is one step of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .precision import exact_product
from .rules import Additive, Diagonal, Forget, Isotropic, Reset, Restored, Rule
from .stream import Belief, Reading, Stream


def token_scan(
    stream: Stream, initial: Belief, prior: Belief, rule: Rule
) -> tuple[Belief, Reading]:
    """Belief after the last token, and every token's reading; one write a token."""

    def body(belief, token):
        return token_step(belief, token, prior, rule)

    return jax.lax.scan(body, initial, _with_restoration(stream, rule))


def _with_restoration(stream: Stream, rule: Rule) -> tuple[Stream, Restored | None]:
    if not isinstance(rule, Restored):
        return stream, None
    every = (stream.length,)
    restoration = jnp.broadcast_to(rule.restoration, every)
    return stream, Restored(restoration, jnp.broadcast_to(rule.variance, every))


def token_step(
    belief: Belief, token: tuple[Stream, Restored | None], prior: Belief, rule: Rule
) -> tuple[Belief, Reading]:
    """One token: time passes, the value is absorbed, the query is read.

    Args:
        belief: before the token.
        token: its stream without a time axis, and its own rule where that is `Restored`.
        prior: what a document starts from.
        rule: what is done to the covariance.
    """
    u, restored = token
    starts = u.starts
    if starts is not None:
        belief = jax.tree.map(lambda old, new: jnp.where(starts, new, old), belief, prior)
    decay = jnp.ones((), u.key.dtype) if u.log_decay is None else jnp.exp(u.log_decay)
    drift = jnp.zeros((), u.key.dtype) if u.drift is None else u.drift
    mean = belief.mean * decay
    if isinstance(rule, Additive):
        return _add(u, Belief(mean, belief.covariance), decay, drift)
    mean, covariance = _predict(Belief(mean, belief.covariance), prior, u, decay, drift, rule)
    if restored is not None:
        reset = restored.variance * jnp.eye(len(covariance), dtype=covariance.dtype)
        kept = restored.restoration
        covariance = kept * covariance + (1 - kept) * reset
    square = _square(covariance, u)
    projected = exact_product(square, u.key)
    innovation_variance = projected @ u.key + u.noise
    gain = projected / innovation_variance
    innovation = u.value - mean @ u.key
    mean = mean + innovation[:, None] * gain
    square = square - projected[:, None] * gain
    left = u.noise * gain - exact_product(square.T, u.key)
    square = square + gain[:, None] * left
    square = (square + square.T) / 2
    after = _conclude(rule, covariance, square, u)
    read = square if after is None else _square(after, u)
    variance = u.query @ exact_product(read, u.query)
    reading = Reading(mean @ u.query, variance, log_density(innovation, innovation_variance))
    return Belief(mean, after), reading


def _square(covariance: Array, u: Stream) -> Array:
    """A covariance, or variances, as a matrix."""
    if covariance.ndim == 2:
        return covariance
    return covariance * jnp.eye(u.key.shape[-1], dtype=covariance.dtype)


def _predict(
    belief: Belief, prior: Belief, u: Stream, decay: Array, drift: Array, rule: Rule
) -> tuple[Array, Array]:
    """Mean and covariance before the write."""
    width = u.key.shape[-1]
    identity = jnp.eye(width, dtype=u.key.dtype)
    if isinstance(rule, Reset):
        return belief.mean, rule.variance * identity
    covariance = belief.covariance
    assert covariance is not None
    match rule:
        case Diagonal():
            return belief.mean, decay**2 * covariance + drift
        case Isotropic():
            return belief.mean, jnp.mean(decay**2) * covariance + jnp.mean(drift)
    outer = jnp.broadcast_to(decay, (width,))
    covariance = outer[:, None] * covariance * outer + identity * drift
    if isinstance(rule, Forget):
        rate = jnp.ones((), u.key.dtype) if u.rate is None else u.rate
        kept = rate * jnp.linalg.inv(covariance)
        restored = (1 - rate) * jnp.linalg.inv(prior.covariance)
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
            information = (count or width) * u.key**2 / u.noise
        case Isotropic(count):
            information = (count or width) * jnp.mean(u.key**2) / u.noise
        case _:
            return posterior
    # 1/(1/p + information), also where p has decayed to 0.
    return prepared / (1 + prepared * information)


def _add(u: Stream, predicted: Belief, decay, drift) -> tuple[Belief, Reading]:
    mean = predicted.mean + u.value[:, None] * u.key
    kept = drift * u.noise / (drift + u.noise) if u.drift is not None else 0.0
    assert predicted.covariance is not None
    variance = decay**2 * predicted.covariance + kept
    read = jnp.sum(variance * u.query**2)
    return Belief(mean, variance), Reading(mean @ u.query, read, jnp.zeros_like(read))


def log_density(innovation: Float[Array, "*time value"], variance: Float[Array, "*time"]) -> Array:
    """Log density of an innovation whose entries have one variance."""
    count = innovation.shape[-1]
    squares = jnp.sum(innovation**2, axis=-1) / variance
    return -0.5 * (squares + count * jnp.log(2 * jnp.pi * variance))
