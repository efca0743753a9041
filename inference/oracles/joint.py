r"""Oracle 1: joint conditioning.

The log density of the whole sequence is quadratic in the latents z. With $\Lambda$ its negative
Hessian, the posterior is $N(\mu, \Lambda^{-1})$ with $\mu = \Lambda^{-1} \nabla \log p(0)$, and

$$ \log p(y) = \log p(\mu, y) + \tfrac12 \dim z \log 2\pi - \tfrac12 \log\det\Lambda. $$

Both are read from NumPyro's own log density, which is then evaluated at random points and compared
with the quadratic: a model with custom derivatives would pass the first and fail the second.
"""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from design_models import DesignModel

from ..claim import Claim, Claimant
from .check import Check
from .program import Program, Seen

THRESHOLD = 1e-8
"""Largest relative error; in float64 the exact filter stays below 1e-11 on generic models."""

ORACLE = "joint conditioning"


class JointPosterior(eqx.Module):
    """The exact posterior of a sequence's last memory and read-out.

    Args:
        mean: of the flattened memory.
        covariance: of the same.
        output_mean: of the flattened read-out.
        output_variance: entry by entry.
        log_evidence: of the whole sequence.
        gap: how far plain evaluation is from the quadratic, at worst.
    """

    mean: Float[Array, " entry"]
    covariance: Float[Array, "entry entry"]
    output_mean: Float[Array, " output"]
    output_variance: Float[Array, " output"]
    log_evidence: Float[Array, ""]
    gap: Float[Array, ""]


def conditioner(model: DesignModel) -> Callable[[Mapping[str, Array], Seen], JointPosterior]:
    """Return (inputs, seen) -> posterior by one dense solve, compiled once for each length."""

    @jax.jit
    def posterior(inputs: Mapping[str, Array], seen: Seen) -> JointPosterior:
        program = Program(model, inputs)
        origin = jnp.zeros(program.size, float)

        def density(latents):
            return program.log_joint(latents, seen)

        precision = -jax.hessian(density)(origin)
        mode = jnp.linalg.solve(precision, jax.grad(density)(origin))
        evidence = (
            density(mode)
            + 0.5 * program.size * jnp.log(2 * jnp.pi)
            - 0.5 * jnp.linalg.slogdet(precision)[1]
        )
        mean, output_mean = program.outcome(mode)
        state_part, output_part = jax.jacfwd(program.outcome)(mode)
        covariance = state_part @ jnp.linalg.solve(precision, state_part.T)
        output_covariance = output_part @ jnp.linalg.solve(precision, output_part.T)
        # Plain evaluation, near and far, against the quadratic.
        scales = jnp.array([0.1, 1.0, 10.0])[:, None]
        points = scales * jax.random.normal(jax.random.key(0), (3, program.size), float)
        quadratic = density(mode) - 0.5 * jnp.einsum("pi,ij,pj->p", points, precision, points)
        plain = jax.vmap(density)(mode + points)
        gap = jnp.max(jnp.abs(plain - quadratic) / (1 + jnp.abs(quadratic)))
        variance = jnp.diagonal(output_covariance)
        return JointPosterior(mean, covariance, output_mean, variance, evidence, gap)

    return posterior


def judge(
    model: DesignModel, claim: Claimant, inputs: Mapping[str, Array], seen: Seen
) -> list[Check]:
    """Compare a claim with the exact posterior after the first and the last step."""
    posterior = conditioner(model)
    steps = len(seen)
    exact = {
        length: posterior({name: array[:length] for name, array in inputs.items()}, seen[:length])
        for length in sorted({1, steps})
    }
    return compare(jax.jit(claim)(inputs, seen), exact)


def compare(claimed: Claim, exact: Mapping[int, JointPosterior]) -> list[Check]:
    """Compare what a filter said with the posteriors after some numbers of steps."""
    errors: dict[str, float] = {}
    for length, posterior in exact.items():
        for quantity, error in _errors(claimed, posterior, length - 1).items():
            errors[quantity] = max(errors.get(quantity, 0.0), error)
    return [
        Check(ORACLE, quantity, error, THRESHOLD, "relative error")
        for quantity, error in errors.items()
    ]


def _errors(claimed: Claim, exact: JointPosterior, last: int) -> dict[str, float]:
    return {
        "mean": relative_error(claimed.means[last], exact.mean),
        "covariance": relative_error(claimed.covariances[last], exact.covariance),
        "read-out mean": relative_error(claimed.output_means[last], exact.output_mean),
        "read-out variance": relative_error(claimed.output_variances[last], exact.output_variance),
        "log evidence": relative_error(
            jnp.sum(claimed.log_evidence[: last + 1]), exact.log_evidence
        ),
        "density at random points": float(exact.gap),
    }


def relative_error(claimed: Float[Array, "..."], exact: Array | np.ndarray) -> float:
    """Largest difference relative to the largest exact entry; NaN counts as infinite."""
    exact = np.asarray(exact)
    difference = np.max(np.abs(np.asarray(claimed) - exact), initial=0)
    error = float(difference / max(1e-300, np.max(np.abs(exact), initial=0)))
    return float("inf") if np.isnan(error) else error
