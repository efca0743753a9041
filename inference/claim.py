"""What a filter claims, in the form that every oracle can judge."""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from design_models.policy import Policy

from .exact_filter import ExactFilter


class Claim(eqx.Module):
    """Beliefs after each step: about the flattened memory, and about the read-out."""

    means: Float[Array, "time entry"]
    covariances: Float[Array, "time entry entry"]
    output_means: Float[Array, "time output"]
    output_variances: Float[Array, "time output"]
    log_evidence: Float[Array, " time"]


Claimant = Callable[[Mapping[str, Array], Float[Array, "time seen"]], Claim]
"""(inputs, observed values) -> what the filter under test says."""


def claimant(exact: ExactFilter, policy: Policy | None = None) -> Claimant:
    """A derived filter, or its reduction under a policy, as a filter under test."""

    def claim(inputs: Mapping[str, Array], observed: Float[Array, "time seen"]) -> Claim:
        filtered = exact.run(inputs, policy=policy, observed=observed)
        return Claim(
            jax.vmap(lambda mean: ravel_pytree(mean)[0])(filtered.means),
            jax.vmap(exact.dense_covariance)(filtered.beliefs.covariance),
            filtered.outputs,
            filtered.output_variances,
            jnp.asarray(filtered.log_evidence),
        )

    return claim
