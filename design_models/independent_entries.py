r"""Design model C: every entry of the memory is a scalar that sees the value on its own.

The entries share nothing: entry (i, j) predicts value i from key j alone, as if the other entries
of its row were absent.

$$ S_{ij,t} = a_{ij,t} S_{ij,t-1} + w,\; w \sim N(0, q_{ij,t}),\quad
   v_{i,t} = k_{j,t} S_{ij,t} + e,\; e \sim N(0, r_{ij,t})\text{ independently over } i, j $$

As a model of one value per token it counts that value once per column. In the first model below
r does not depend on the column; in the second the other entries of the row act as noise.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray

from .associative_regression import check_widths
from .design_model import DesignModel
from .errors import ModelError


def independent_entries(
    value_width: int, key_width: int, *, prior_variance: float = 1.0
) -> DesignModel:
    r"""Return design model C with r_ij = r_i: Kalman Linear Attention.

    Its exact filter, in precisions λ and precision-weighted means η, is

    $$ \lambda = \frac{\lambda'}{a^2 + q\lambda'} + \frac{k_j^2}{r_i},\quad
       \eta = \frac{a\,\eta'}{a^2 + q\lambda'} + \frac{v_i k_j}{r_i} $$

    with λ', η' those of the step before: a Möbius map of the precision.

    Inputs a step: `key` (key,), `value` (value,), `query` (key,), `decay` (value, key), `drift`
    variance (value, key), `noise` variance per value channel (value,).

    Args:
        value_width: rows of the memory.
        key_width: columns of the memory.
        prior_variance: variance of every entry at the start.

    Raises:
        ModelError: a width or `prior_variance` makes no sense.

    Source: Shaj et al. (2026), arXiv 2602.10743.
    """

    def transition(memory, u):
        mean = memory * u["decay"]
        return numpyro.sample("memory", dist.Normal(mean, jnp.sqrt(u["drift"])).to_event(2))

    def observe(memory, u):
        _observe_entries(memory, u["key"], u["value"], u["noise"][:, None])

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        rng_decay, rng_drift, rng_rest = jax.random.split(rng, 3)
        shape = (steps, value_width, key_width)
        return {
            **_common_inputs(rng_rest, steps, value_width, key_width),
            "decay": jax.random.uniform(rng_decay, shape, minval=0.7, maxval=0.99),
            "drift": jax.random.uniform(rng_drift, shape, minval=0.05, maxval=0.3),
        }

    return DesignModel(
        _prior(value_width, key_width, prior_variance), transition, observe, inputs=inputs
    )


def independent_entries_with_crosstalk(
    value_width: int, key_width: int, *, entry_variance: float = 1.0
) -> DesignModel:
    r"""Return design model C with the rest of the row as noise: Longhorn.

    The value is the whole row read at the key, v_i = Σ_l k_l S_il + e. Entry (i, j) takes the other
    entries of its row for independent noise of mean zero and variance σ² each:

    $$ r_{ij} = r_i + \sigma^2(\|k\|^2 - k_j^2) $$

    With the covariance reset to σ² = 1 before each write (`policy.Reset`), the innovation variance
    is r_i + ‖k‖² in every column, the gain k_j Δ_i with Δ_i = β_i/(1 + β_i‖k‖²), β_i = 1/r_i, and
    the update Longhorn's: M_ij ← M_ij (1 − Δ_i k_j²) + Δ_i k_j v_i.

    Inputs a step: `key` (key,), `value` (value,), `query` (key,), `noise` variance per value
    channel (value,), Longhorn's 1/β_i.

    Args:
        value_width: rows of the memory.
        key_width: columns of the memory.
        entry_variance: σ², the variance of every entry at the start and, as noise, throughout.

    Raises:
        ModelError: a width or `entry_variance` makes no sense.

    Source: Liu et al. (2024), arXiv 2407.14207.
    """

    def transition(memory, u):
        return memory

    def observe(memory, u):
        others = jnp.sum(u["key"] ** 2) - u["key"] ** 2
        noise = u["noise"][:, None] + entry_variance * others
        _observe_entries(memory, u["key"], u["value"], noise)

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        return _common_inputs(rng, steps, value_width, key_width)

    return DesignModel(
        _prior(value_width, key_width, entry_variance), transition, observe, inputs=inputs
    )


def _prior(value_width: int, key_width: int, variance: float):
    check_widths(value_width, key_width)
    if variance <= 0:
        raise ModelError(f"the prior variance is {variance}; it must be positive.")

    def prior():
        mean = jnp.zeros((value_width, key_width))
        return numpyro.sample("memory", dist.Normal(mean, variance**0.5).to_event(2))

    return prior


def _observe_entries(memory, key, value, noise):
    """Every entry sees its row's value through its own key: the value is counted per column."""
    numpyro.sample(
        "value",
        dist.Normal(memory * key, jnp.sqrt(noise)).to_event(2),
        obs=jnp.broadcast_to(value[:, None], memory.shape),
    )


def _common_inputs(
    rng: PRNGKeyArray, steps: int, value_width: int, key_width: int
) -> dict[str, Array]:
    rngs = jax.random.split(rng, 4)
    return {
        "key": jax.random.normal(rngs[0], (steps, key_width)) / key_width**0.5,
        "value": jax.random.normal(rngs[1], (steps, value_width)),
        "query": jax.random.normal(rngs[2], (steps, key_width)) / key_width**0.5,
        "noise": jax.random.uniform(rngs[3], (steps, value_width), minval=0.1, maxval=0.6),
    }
