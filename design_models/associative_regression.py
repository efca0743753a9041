r"""Design model A: the memory is a linear map from keys to values, seen through noise.

Every token is a noisy observation of what the memory holds: its value is the memory read at its
key. Between tokens the memory decays and drifts.

$$ S_0 \sim N(0, p_0),\quad S_t = S_{t-1}\,\mathrm{diag}(a_t) + W_t,\; W_t \sim N(0, q_t),\quad
   v_t = S_t k_t + e_t,\; e_t \sim N(0, r_t) $$

Its exact filter is the Bayesian Layer; resetting the covariance before each write gives the delta
rule (`design_models.policy`).
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray

from .design_model import DesignModel
from .errors import ModelError

Rate = Literal["none", "scalar", "key"]
"""Absent, one number per step, or one number per key and step."""


def associative_regression(
    value_width: int,
    key_width: int,
    *,
    decay: Rate = "none",
    drift: Rate = "none",
    observations: int = 1,
    prior_variance: float | Sequence[float] = 1.0,
) -> DesignModel:
    """Return design model A with memory (value, key).

    Inputs a step: `key` (key,), `value` (value,), `noise` variance (), `query` (key,), and, unless
    "none", `decay` and `drift` variance, () or (key,). With several observations a step `key` is
    (observation, key), `value` (observation, value), `noise` () or (observation,).

    Args:
        value_width: rows of the memory.
        key_width: columns of the memory.
        decay: what the memory is multiplied by before each write.
        drift: process noise added before each write; "none" is a memory that never wanders.
        observations: how many (key, value) pairs each step holds, all of the same memory.
        prior_variance: variance of every entry at the start, or one number per key.

    Raises:
        ModelError: a width, a rate, `observations` or `prior_variance` makes no sense.
    """
    check_widths(value_width, key_width)
    check_rate("decay", decay)
    check_rate("drift", drift)
    if observations < 1:
        raise ModelError(f"`observations` is {observations}; a step needs at least 1.")
    variances = [prior_variance] if isinstance(prior_variance, int | float) else [*prior_variance]
    if len(variances) not in (1, key_width) or min(variances) <= 0:
        raise ModelError(
            f"`prior_variance` is {prior_variance}; it must be positive, one number or {key_width}."
        )

    def prior():
        scale = jnp.sqrt(jnp.array(variances, jnp.result_type(float)))
        mean = jnp.zeros((value_width, key_width))
        return numpyro.sample("memory", dist.Normal(mean, scale).to_event(2))

    def transition(memory, u):
        kept = memory if decay == "none" else memory * u["decay"]
        if drift == "none":
            return kept
        return numpyro.sample("memory", dist.Normal(kept, jnp.sqrt(u["drift"])).to_event(2))

    def observe(memory, u):
        if observations == 1:
            mean, scale = memory @ u["key"], jnp.sqrt(u["noise"])
            numpyro.sample("value", dist.Normal(mean, scale).to_event(1), obs=u["value"])
        else:
            noise = jnp.broadcast_to(u["noise"], (observations,))
            mean, scale = u["key"] @ memory.T, jnp.sqrt(noise)[:, None]
            numpyro.sample("value", dist.Normal(mean, scale).to_event(2), obs=u["value"])

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        each = () if observations == 1 else (observations,)
        width = {"scalar": (), "key": (key_width,)}
        rngs = jax.random.split(rng, 6)
        drawn = {
            "key": jax.random.normal(rngs[0], (steps, *each, key_width)) / key_width**0.5,
            "value": jax.random.normal(rngs[1], (steps, *each, value_width)),
            "query": jax.random.normal(rngs[2], (steps, key_width)) / key_width**0.5,
            "noise": jax.random.uniform(rngs[3], (steps, *each), minval=0.1, maxval=0.6),
        }
        if decay != "none":
            shape = (steps, *width[decay])
            drawn["decay"] = jax.random.uniform(rngs[4], shape, minval=0.7, maxval=0.99)
        if drift != "none":
            shape = (steps, *width[drift])
            drawn["drift"] = jax.random.uniform(rngs[5], shape, minval=0.05, maxval=0.3)
        return drawn

    defaults_fit = observations == 1 and "key" not in (decay, drift)
    return DesignModel(prior, transition, observe, inputs=None if defaults_fit else inputs)


def check_widths(value_width: int, key_width: int) -> None:
    """Raise ModelError unless both widths are at least 1."""
    for name, width in (("value_width", value_width), ("key_width", key_width)):
        if width < 1:
            raise ModelError(f"`{name}` is {width}; a memory needs at least 1.")


def check_rate(name: str, rate: Rate) -> None:
    """Raise ModelError unless `rate` is one of the words of `Rate`."""
    if rate not in ("none", "scalar", "key"):
        raise ModelError(f'`{name}` is {rate!r}; it must be "none", "scalar" or "key".')
