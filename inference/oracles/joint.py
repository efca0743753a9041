r"""Oracle 1: joint conditioning.

The log density of the whole sequence is quadratic in the latents z. With $\Lambda$ its negative
Hessian, the posterior is $N(\mu, \Lambda^{-1})$ with $\mu = \Lambda^{-1} \nabla \log p(0)$, and

$$ \log p(y) = \log p(\mu, y) + \tfrac12 \dim z \log 2\pi - \tfrac12 \log\det\Lambda. $$

Both are read from NumPyro's own log density, which is then evaluated at random points and compared
with the quadratic: a model with custom derivatives would pass the first and fail the second.
"""

from collections.abc import Mapping

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


class JointPosterior:
    """The exact posterior of a sequence, by one dense solve."""

    def __init__(self, program: Program, seen: Seen) -> None:
        origin = jnp.zeros(program.size, float)

        @jax.jit
        def solve(seen: Seen):
            def density(latents):
                return program.log_joint(latents, seen)

            precision = -jax.hessian(density)(origin)
            mode = jnp.linalg.solve(precision, jax.grad(density)(origin))
            evidence = (
                density(mode)
                + 0.5 * program.size * jnp.log(2 * jnp.pi)
                - 0.5 * jnp.linalg.slogdet(precision)[1]
            )
            outcome = program.outcome(mode)
            state_part, output_part = jax.jacfwd(program.outcome)(mode)
            state_cov = state_part @ jnp.linalg.solve(precision, state_part.T)
            output_cov = output_part @ jnp.linalg.solve(precision, output_part.T)
            # Plain evaluation, near and far, against the quadratic.
            scales = jnp.array([0.1, 1.0, 10.0])[:, None]
            points = scales * jax.random.normal(jax.random.key(0), (3, program.size), float)
            quadratic = density(mode) - 0.5 * jnp.einsum("pi,ij,pj->p", points, precision, points)
            plain = jax.vmap(density)(mode + points)
            gap = jnp.max(jnp.abs(plain - quadratic) / (1 + jnp.abs(quadratic)))
            return *outcome, state_cov, jnp.diagonal(output_cov), evidence, gap

        (
            self.mean,
            self.output_mean,
            self.covariance,
            self.output_variance,
            self.log_evidence,
            self.gap,
        ) = (np.asarray(part) for part in solve(seen))


def judge(
    model: DesignModel, claim: Claimant, inputs: Mapping[str, Array], seen: Seen
) -> list[Check]:
    """Compare a claim with the exact posterior after the first, second and last step."""
    steps = len(seen)
    claimed = jax.jit(claim)(inputs, seen)
    errors: dict[str, float] = {}
    for length in sorted({1, min(2, steps), steps}):
        head = {name: array[:length] for name, array in inputs.items()}
        exact = JointPosterior(Program(model, head), seen[:length])
        for quantity, error in _errors(claimed, exact, length - 1).items():
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


def relative_error(claimed: Float[Array, "..."], exact: np.ndarray) -> float:
    """Largest difference relative to the largest exact entry; NaN counts as infinite."""
    difference = np.max(np.abs(np.asarray(claimed) - exact), initial=0)
    error = float(difference / max(1e-300, np.max(np.abs(exact), initial=0)))
    return float("inf") if np.isnan(error) else error
