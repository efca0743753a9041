"""Compare extracted coefficients with plain evaluations of the model at random points.

The degree proof shows that log densities are quadratic; the coefficients are read by
differentiation. A custom derivative, a hidden normaliser or a function that answers differently
when called again would slip between the two. Here every site's log density is evaluated at random
values and compared with the Gaussian claimed for it, and every affine map at random memories and
draws with the coefficients claimed for it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray
from numpyro import distributions as dist
from numpyro.distributions import constraints

from .errors import NotLinearGaussian, NotSupported
from .extraction import AffineMap, affine_map, draws_size, noise_response, step_coefficients
from .linear_gaussian import Step
from .partition import Partition
from .proof import Proof, ProvedFunction
from .tracing import EARLIER_CALL, Site, innermost, moments, run_with_values

TOLERANCE = 1e-6
"""Largest relative disagreement between evaluation and claim; float64 rounding stays below 1e-9."""


def check_sites(proof: Proof, u: Mapping[str, Array], rng: PRNGKeyArray) -> float:
    """Check every site's parameters and log density at one random point, for one step's inputs.

    Returns:
        The largest relative disagreement.

    Raises:
        NotLinearGaussian: a parameter is outside its constraint, a noise is not positive and
            finite, or a log density is not the Gaussian's.
    """
    worst = 0.0
    for function in (proof.prior, proof.transition, proof.observe, proof.readout):
        rng, memory_rng, values_rng = jax.random.split(rng, 3)
        flat, unravel = ravel_pytree(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float), proof.memory)
        )
        memory = unravel(jax.random.normal(memory_rng, flat.shape, float))
        values = {
            site.name: jax.random.normal(jax.random.fold_in(values_rng, i), site.shape, float)
            for i, site in enumerate(function.sites)
        }
        argument = memory if function.takes_memory else None
        _, sites = run_with_values(function.name, function.call, (argument, u), values)
        drawn = {name for name, site in sites.items() if not site.deterministic}
        if drawn != set(values):
            raise NotSupported(
                function.name,
                "",
                f"samples {sorted(drawn)}, which the proof met as {sorted(values)}; a site's name "
                "must be the same for every input and call",
            )
        for site in sites.values():
            try:
                if site.deterministic:
                    _check_weight(function.name, site)
                else:
                    worst = max(worst, _check_site(function.name, site))
            except jax.errors.UnexpectedTracerError as error:
                raise NotSupported(function.name, site.name, EARLIER_CALL, site.location) from error
    return worst


def _check_weight(function: str, site: Site) -> None:
    if jnp.any(innermost(site.distribution).log_density != 0):
        reason = "its log_density re-weights the model; leave it out"
        raise NotLinearGaussian(function, site.name, reason, site.location)


def _check_site(function: str, site: Site) -> float:
    if site.observed and not jnp.all(jnp.isfinite(site.observation)):
        reason = "its observed value is not finite; give a missing entry a large noise variance"
        raise NotSupported(function, site.name, reason, site.location)
    base = innermost(site.distribution)
    for name, constraint in base.arg_constraints.items():
        parameter = base.__dict__.get(name)
        if parameter is None or isinstance(constraint, type(constraints.dependent)):
            continue
        if not bool(jnp.all(constraint(parameter))):
            reason = f"its {name} is {brief(parameter)}; it must be {constraint} and finite"
            raise NotLinearGaussian(function, site.name, reason, site.location)
    error, white, log_determinant = _whiten(site)
    if not np.all(np.isfinite(white)) or not np.isfinite(log_determinant):
        reason = (
            f"its noise is not positive and finite ({type(base).__name__}: {_parameters(base)})"
        )
        raise NotLinearGaussian(function, site.name, reason, site.location)
    claimed = -0.5 * (white @ white + error.size * np.log(2 * np.pi) + log_determinant)
    found = float(jnp.sum(site.distribution.log_prob(site.value)))
    disagreement = abs(found - claimed) / max(1.0, abs(claimed))
    if not disagreement <= TOLERANCE:
        raise NotLinearGaussian(
            function,
            site.name,
            f"its log density is {found:.6g} at a random point, where the Gaussian of its mean "
            f"and covariance has {claimed:.6g}: a hidden factor, or a custom derivative",
            site.location,
        )
    return disagreement


def _whiten(site: Site) -> tuple[np.ndarray, np.ndarray, float]:
    """Error from the claimed mean, the same in standard deviations, and log det covariance."""
    shape = jnp.shape(site.value)
    if type(innermost(site.distribution)) is dist.Normal:
        mean, noise = moments(site.distribution, shape)
        error, deviation = (
            np.ravel(site.value - mean),
            np.ravel(noise(jnp.ones(shape, float))),
        )
        with np.errstate(all="ignore"):
            return error, error / deviation, float(2 * np.sum(np.log(deviation)))

    @jax.jit
    def apart(value: Array) -> tuple[Array, Array]:
        mean, noise = moments(site.distribution, shape)
        units = jnp.eye(value.size)
        rows = jax.vmap(lambda unit: jnp.ravel(noise(unit.reshape(shape))))(units)
        return jnp.ravel(value - mean), rows

    error, factor = map(np.asarray, apart(site.value))
    covariance = factor.T @ factor
    if not np.all(np.isfinite(covariance)) or np.linalg.eigvalsh(covariance)[0] <= 0:
        return error, np.full_like(error, np.nan), np.nan
    root = np.linalg.cholesky(covariance)
    return error, np.linalg.solve(root, error), float(2 * np.sum(np.log(np.diag(root))))


def brief(parameter: Any) -> str:
    """The first few entries of a parameter."""
    values = np.ravel(np.asarray(parameter))
    shown = ", ".join(f"{value:.4g}" for value in values[:4])
    return shown if len(values) <= 4 else f"[{shown}, ...]"


def _parameters(base: Any) -> str:
    found = {name: base.__dict__.get(name) for name in base.arg_constraints}
    return ", ".join(f"{k} = {brief(v)}" for k, v in found.items() if v is not None)


def check_steps(
    proof: Proof, partition: Partition, inputs: Mapping[str, Array], rng: PRNGKeyArray
) -> float:
    """Check every step's coefficients against plain evaluation at random memories and draws.

    All rows and blocks take part, so this also certifies the partition at the model's real size.

    Returns:
        The largest relative disagreement.

    Raises:
        NotLinearGaussian: above `TOLERANCE`.
    """
    compare = jax.jit(lambda u, rng: _disagreements(proof, partition, u, rng))
    worst = 0.0
    for t in range(len(jax.tree.leaves(inputs)[0])):
        u = {name: array[t] for name, array in inputs.items()}
        for function, value in compare(u, jax.random.fold_in(rng, t)).items():
            disagreement = float(value)
            if not disagreement <= TOLERANCE:
                raise NotLinearGaussian(
                    function,
                    "",
                    "plain evaluation disagrees with the coefficients read by differentiation "
                    f"(relative error {disagreement:.1e}): a custom derivative, or a function that "
                    "answers differently when called again",
                )
            worst = max(worst, disagreement)
    return worst


def _disagreements(proof: Proof, partition: Partition, u, rng) -> dict[str, Array]:
    """Largest relative disagreement of each function, at one random memory and draws."""
    step = step_coefficients(proof, partition, u)
    keys = jax.random.split(rng, 8)
    state = jax.random.normal(keys[0], (partition.states.size,), float)

    def setting(function: ProvedFunction, key) -> tuple[AffineMap, Array]:
        run = affine_map(function, proof.memory, u)
        return run, jax.random.normal(key, (draws_size(function),), float)

    transition, draws = setting(proof.transition, keys[1])
    pairs = {
        "transition": _means(transition, state, draws, step, partition)
        + _noise(transition, state, draws, step, partition, keys[2])
    }
    observe, draws = setting(proof.observe, keys[3])
    pairs["observe"] = _linear(observe, state, draws)
    if step.observation is not None:
        given = step.observation
        seen = observe(state, jnp.zeros_like(draws))[1]
        claimed = state[partition.states] @ given.observation.mT + given.shift
        cotangent = jax.random.normal(keys[4], seen.shape, float)
        returned = jnp.zeros_like(observe(state, draws)[0])
        found = noise_response(observe, state, draws)(returned, cotangent)[1]
        pairs["observe"] += [
            (seen[partition.observed], claimed),
            (found[partition.observed], cotangent[partition.observed] @ given.noise),
        ]
    for name, function, key in (
        ("prior", proof.prior, keys[5]),
        ("readout", proof.readout, keys[6]),
    ):
        run, draws = setting(function, key)
        pairs[name] = _linear(run, state, draws)
    return {name: jnp.max(jnp.stack([_gap(*pair) for pair in own])) for name, own in pairs.items()}


def _means(run: AffineMap, state, draws, step: Step, partition: Partition) -> list:
    moved, seen = run(state, jnp.zeros_like(draws))
    blocks = state[partition.states]
    pairs = [(moved[partition.states], blocks @ step.transition.mT + step.shift)]
    if step.evidence is not None:
        given = step.evidence
        pairs.append((seen[partition.evidence], blocks @ given.observation.mT + given.shift))
    return pairs


def _noise(run: AffineMap, state, draws, step: Step, partition: Partition, rng) -> list:
    moved, seen = run(state, draws)
    first, second = jax.random.split(rng)
    along_state = jax.random.normal(first, moved.shape, float)
    along_seen = jax.random.normal(second, seen.shape, float)
    found_state, found_seen = noise_response(run, state, draws)(along_state, along_seen)
    blocks = along_state[partition.states]
    claimed_state = blocks @ step.drift
    pairs = _linear(run, state, draws)
    if step.evidence is not None:
        sights = along_seen[partition.evidence]
        claimed_state += sights @ step.evidence.cross.mT
        claimed_seen = blocks @ step.evidence.cross + sights @ step.evidence.noise
        pairs.append((found_seen[partition.evidence], claimed_seen))
    return [*pairs, (found_state[partition.states], claimed_state)]


def _linear(run: AffineMap, state, draws) -> list:
    """Plain evaluation along memory and draws against the derivative along them."""
    origin = run(jnp.zeros_like(state), jnp.zeros_like(draws))
    zeros = (jnp.zeros_like(state), jnp.zeros_like(draws))
    derivative = jax.jvp(run, zeros, (state, draws))[1]
    return [
        (there - here, along)
        for there, here, along in zip(run(state, draws), origin, derivative, strict=True)
    ]


def _gap(found: Array, claimed: Array) -> Array:
    scale = jnp.maximum(1.0, jnp.max(jnp.abs(found), initial=0))
    return jnp.max(jnp.abs(found - claimed), initial=0) / scale
