"""The joint density of a design model's sequence, evaluated and never differentiated.

No custom derivative can fool it: whether the density is quadratic is seen by finite differences
along lines, and the posterior of a quadratic one is read off its values at unit vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import log_density

from design_models import DesignModel


@dataclass(frozen=True)
class Posterior:
    """The last memory, flattened, given everything observed."""

    mean: np.ndarray
    covariance: np.ndarray
    log_evidence: float


@dataclass(frozen=True)
class JointDensity:
    """Points in the space of all latent sites -> (log density, last memory) at each."""

    size: int
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def innermost(distribution):
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


def joint_density(model: DesignModel, inputs: dict[str, jax.Array]) -> JointDensity:
    """Trace the sequence without its read-out, whose sites `y` are not latent."""
    sequence = model.sequence(inputs)
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        sequence()
    latent = {
        name: jnp.zeros(jnp.shape(site["value"]), float)
        for name, site in trace.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not name.endswith("/y")
        and not isinstance(innermost(site["fn"]), dist.Delta)
    }
    origin, unravel = ravel_pytree(latent)

    def unread():
        with handlers.block(hide=[name for name in trace if name.endswith("/y")]):
            return sequence()

    @jax.jit
    @jax.vmap
    def evaluate(flat):
        values = unravel(flat)
        with handlers.seed(rng_seed=0):
            density, _ = log_density(unread, (), {}, values)
            memories, _ = handlers.substitute(sequence, data=values)()
        return density, ravel_pytree(memories[-1])[0]

    def on_numpy(points):
        return tuple(np.asarray(part, float) for part in evaluate(jnp.asarray(points)))

    return JointDensity(origin.size, on_numpy)


def departure_from_quadratic(joint: JointDensity, seed: int, scale: float) -> float:
    """Third differences of log density and second of memory along random lines, at worst.

    Relative to the largest difference of one order lower met on the way: rounding of a quadratic
    leaves about 1e-15 times the density, over what the density itself moves by.
    """
    rng = np.random.default_rng(seed)
    start, slope = scale * rng.normal(size=(2, 6, 1, joint.size))
    points = (start + np.arange(4)[:, None] * slope).reshape(-1, joint.size)
    densities, memories = joint.evaluate(points)
    densities, memories = densities.reshape(6, 4), memories.reshape(6, 4, -1)
    if not (np.isfinite(densities).all() and np.isfinite(memories).all()):
        return np.inf
    worst = 0.0
    for values, order in ((densities, 3), (memories, 2)):
        size = np.maximum(1.0, np.max(np.abs(values), axis=1, initial=0))
        bent = np.max(np.abs(np.diff(values, order, axis=1)), axis=1, initial=0)
        worst = max(worst, float(np.max(bent / size, initial=0)))
    return worst


def condition_densely(model: DesignModel, inputs: dict[str, jax.Array]) -> Posterior:
    """Condition the joint density of all latent sites, found by evaluating it at unit vectors."""
    return posterior_of(joint_density(model, inputs))


def posterior_of(joint: JointDensity) -> Posterior:
    """Condition a joint density, asserting at a random point that it is quadratic."""
    units = np.eye(joint.size)
    pairs = (units[:, None] + units[None, :]).reshape(-1, joint.size)
    anywhere = np.random.default_rng(1).normal(size=(1, joint.size))
    points = np.concatenate([np.zeros((1, joint.size)), units, -units, pairs, anywhere])
    densities, memories = joint.evaluate(points)
    at_zero, there, back = densities[0], *np.split(densities[1 : 1 + 2 * len(units)], 2)
    both = densities[1 + 2 * len(units) : -1].reshape(len(units), len(units))
    precision = -(both - there[:, None] - there[None, :] + at_zero)
    gradient = (there - back) / 2
    quadratic = at_zero + anywhere[0] @ gradient - anywhere[0] @ precision @ anywhere[0] / 2
    np.testing.assert_allclose(densities[-1], quadratic, rtol=1e-9, atol=1e-9)
    covariance = np.linalg.inv(precision)
    mean = covariance @ gradient
    linear = (memories[1 : 1 + len(units)] - memories[0]).T
    return Posterior(
        memories[0] + linear @ mean,
        linear @ covariance @ linear.T,
        float(at_zero + gradient @ mean / 2 + np.linalg.slogdet(2 * np.pi * covariance)[1] / 2),
    )


def assert_filter_conditions_densely(exact, inputs, expected: Posterior, tolerance=1e-9) -> None:
    """Compare a derived filter's last belief and its log evidence with a dense posterior."""
    filtered = exact.run(inputs)
    mean = ravel_pytree(jax.tree.map(lambda leaf: leaf[-1], filtered.means))[0]
    covariance = np.asarray(filtered.covariances[-1])
    if exact.shares_rows:
        covariance = np.kron(np.eye(mean.size // len(covariance)), covariance)
    near = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(mean, expected.mean, **near)
    np.testing.assert_allclose(covariance, expected.covariance, **near)
    np.testing.assert_allclose(jnp.sum(filtered.log_evidence), expected.log_evidence, **near)
