"""What a reduction costs: the divergence of its belief from the exact posterior."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from design_models.policy import Policy

from .exact_filter import ExactFilter
from .oracles.program import Program

STREAM = 16
"""Steps of the simulated stream along which a reduction is compared with the exact filter."""


def gaussian_divergence(
    mean: Float[Array, " entry"],
    covariance: Float[Array, "entry entry"],
    other_mean: Float[Array, " entry"],
    other_covariance: Float[Array, "entry entry"],
) -> Float[Array, ""]:
    r"""KL divergence of $N(m_1, P_1)$ from $N(m_0, P_0)$, in nats.

    $$ \tfrac12 [ \mathrm{tr}(P_1^{-1} P_0) - n + (m_1 - m_0)^\top P_1^{-1} (m_1 - m_0)
       + \log\det P_1 - \log\det P_0 ] $$
    """
    difference = other_mean - mean
    trace = jnp.trace(jnp.linalg.solve(other_covariance, covariance))
    distance = difference @ jnp.linalg.solve(other_covariance, difference)
    ratio = jnp.linalg.slogdet(other_covariance)[1] - jnp.linalg.slogdet(covariance)[1]
    return 0.5 * (trace - len(mean) + distance + ratio)


def reduction_cost(
    exact: ExactFilter, policy: Policy, inputs: Mapping[str, Array], rng: PRNGKeyArray
) -> float:
    """Mean divergence per step of a reduction's belief from the exact posterior, in nats.

    The observed values are simulated from the model's own prior.
    """
    _, _, seen = Program(exact.model, inputs).simulate(rng)

    @jax.jit
    def cost(seen: Array) -> Array:
        true = exact.run(inputs, observed=seen).beliefs
        reduced = exact.run(inputs, observed=seen, policy=policy).beliefs

        def at_step(mean, covariance, other_mean, other_covariance):
            return gaussian_divergence(
                exact.flat(mean),
                exact.dense_covariance(covariance),
                exact.flat(other_mean),
                exact.dense_covariance(other_covariance),
            )

        return jnp.mean(
            jax.vmap(at_step)(true.mean, true.covariance, reduced.mean, reduced.covariance)
        )

    return float(cost(seen))
