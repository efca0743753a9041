"""Links: from any number that a projection gives to the range of an input.

Rates and noises are computed in float32 whatever the sequence's dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .precision import LARGEST_RATIO
from .sources import unit

GATE_TEMPERATURE = 16.0
"""GLA's τ: decays are σ(·)^(1/τ)."""


def softplus(logit: Array) -> Array:
    """A positive number."""
    return jax.nn.softplus(logit.astype(jnp.float32))


def sigmoid(logit: Array) -> Array:
    """A number between 0 and 1."""
    return jax.nn.sigmoid(logit.astype(jnp.float32))


def noise_of_strength(logit: Array) -> Array:
    """The noise at which a reset unit key is written with β = σ(logit): r = (1 − β)/β."""
    return jnp.exp(-logit.astype(jnp.float32))


def bounded_noise(logit: Array) -> Array:
    """`noise_of_strength`, kept where a float32 covariance of variance 1 holds its precision."""
    return jnp.maximum(noise_of_strength(logit), 1 / LARGEST_RATIO)


def noise_of_weight(logit: Array) -> Array:
    """The noise at which information weighs β = σ(logit): r = 1/β."""
    return 1 + noise_of_strength(logit)


def bounded_softplus(logit: Array) -> Array:
    """A positive number, kept in the range of `bounded_noise`."""
    return jnp.maximum(softplus(logit), 1 / LARGEST_RATIO)


def drift(logit: Array) -> Array:
    """Process noise, at most a prior variance of 1 a step."""
    return jnp.minimum(softplus(logit), 1.0)


def stationary_variance(logit: Array) -> Array:
    """A variance between 0 and 2; 1, that of the prior, at 0."""
    return 2 * sigmoid(logit)


def log_forget(logit: Array) -> Array:
    """GLA's log decay, log σ(logit)/τ."""
    return jax.nn.log_sigmoid(logit.astype(jnp.float32)) / GATE_TEMPERATURE


def log_decay(logit: Array) -> Array:
    """A log decay, −softplus(logit)."""
    return -softplus(logit)


def negative_exp(logit: Array) -> Array:
    """A log decay per unit of time, −exp(logit)."""
    return -jnp.exp(logit.astype(jnp.float32))


def feature(x: Array) -> Array:
    """Linear attention's φ(x) = elu(x) + 1."""
    return jax.nn.elu(x) + 1


def scaled(query: Array) -> Array:
    """Divided by √width."""
    return query / query.shape[-1] ** 0.5


def silu_unit(key: Array) -> Array:
    """A delta rule's key: SiLU, then length 1."""
    return unit(jax.nn.silu(key))


def scaled_silu_unit(query: Array) -> Array:
    """A delta rule's query: as its keys, divided by √width."""
    return scaled(silu_unit(query))
