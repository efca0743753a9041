r"""Coefficients of a proved design model, read off the model itself.

With every site at its mean plus noise driven by standard normal draws, a proved function is an
affine map of (memory, draws). Its linear parts are read by differentiation along few directions:
one per column of a block, since blocks do not mix and rows repeat. `inference.evaluation` then
compares them with plain evaluations at random points, so that nothing rests on automatic
differentiation being honest.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .linear_gaussian import Belief, Evidence, Observation, Observed, Step
from .partition import Index, Partition
from .proof import Proof, ProvedFunction
from .tracing import run_with_draws, run_with_values

Vector = Float[Array, "_"]
AffineMap = Callable[[Vector, Vector], tuple[Vector, Vector]]
"""(memory, draws) -> (returned, observed), all flattened."""


def affine_map(function: ProvedFunction, memory: Any, u: Mapping[str, Array]) -> AffineMap:
    """Return a proved function as an affine map of flattened memory and draws."""
    zeros = _zeros(memory)
    _, unravel = ravel_pytree(zeros)
    shapes = {site.name: jnp.zeros(site.shape, float) for site in function.sites}
    _, unravel_draws = ravel_pytree(shapes)

    def run(state: Vector, draws: Vector) -> tuple[Vector, Vector]:
        argument = unravel(state) if function.takes_memory else None
        returned, sites = run_with_draws(
            function.name, function.call, (argument, u), unravel_draws(draws)
        )
        observed = [jnp.ravel(sites[site.name].value) for site in function.observed]
        flat, _ = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), returned))
        return flat, jnp.concatenate([*observed, jnp.zeros(0, float)])

    return run


def draws_size(function: ProvedFunction) -> int:
    """How many standard normal draws drive a function."""
    return sum(site.size for site in function.sites)


def observed_values(proof: Proof, u: Mapping[str, Array]) -> tuple[Vector, Vector]:
    """The values observed inside `transition` and inside `observe`, as `u` gives them."""
    memory = _zeros(proof.memory)

    def values(function: ProvedFunction) -> Vector:
        _, sites = run_with_values(function.name, function.call, (memory, u), {})
        seen = [jnp.ravel(sites[site.name].observation) for site in function.observed]
        return jnp.concatenate([*(s.astype(float) for s in seen), jnp.zeros(0, float)])

    return values(proof.transition), values(proof.observe)


def prior_moments(proof: Proof) -> tuple[Vector, Float[Array, "entry draw"]]:
    """Mean of the flattened memory and a factor of its covariance, dense: for small memories."""
    run = affine_map(proof.prior, proof.memory, {})
    size = sum(leaf.size for leaf in jax.tree.leaves(proof.memory))
    draws = jnp.zeros(draws_size(proof.prior), float)
    state = jnp.zeros(size, float)
    return run(state, draws)[0], jax.jacfwd(lambda d: run(state, d)[0])(draws)


def prior_belief(proof: Proof, partition: Partition) -> Belief:
    """The prior in the partition's blocks."""
    size = partition.states.size
    program = _Probe(affine_map(proof.prior, proof.memory, {}), size, draws_size(proof.prior))
    returned, _ = program.at_zero
    covariance, _, _ = program.covariances(partition.states, None)
    return Belief(returned[partition.states], covariance)


def step_coefficients(proof: Proof, partition: Partition, u: Mapping[str, Array]) -> Step:
    """Coefficients of one step in the partition's blocks; `u` may be traced."""
    size = partition.states.size
    moved = _Probe(
        affine_map(proof.transition, proof.memory, u), size, draws_size(proof.transition)
    )
    mean, evidence_mean = moved.at_zero
    transition, evidence_matrix = moved.matrices(
        partition.states, partition.states, partition.evidence
    )
    drift, cross, evidence_noise = moved.covariances(partition.states, partition.evidence)
    evidence = None
    if partition.evidence is not None:
        shift = evidence_mean[partition.evidence]
        evidence = Evidence(evidence_matrix, shift, evidence_noise, cross)
    observation = None
    if partition.observed is not None:
        seen = _Probe(affine_map(proof.observe, proof.memory, u), size, draws_size(proof.observe))
        _, matrix = seen.matrices(partition.states, None, partition.observed)
        _, _, noise = seen.covariances(None, partition.observed)
        observation = Observation(matrix, seen.at_zero[1][partition.observed], noise)
    return Step(transition, mean[partition.states], drift, evidence, observation)


def arrange_observed(partition: Partition, evidence: Vector, observation: Vector) -> Observed:
    """Arrange flattened observed values in the partition's blocks."""
    return Observed(
        None if partition.evidence is None else evidence[partition.evidence],
        None if partition.observed is None else observation[partition.observed],
    )


class _Probe:
    """Reads the linear parts of an affine map block by block; the map itself runs once."""

    def __init__(self, run: AffineMap, state_size: int, draw_size: int) -> None:
        self.state = jnp.zeros(state_size, float)
        self.draws = jnp.zeros(draw_size, float)
        self.at_zero, self.linear = jax.linearize(run, self.state, self.draws)

    def matrices(self, columns: Index, states: Index | None, seen: Index | None) -> Any:
        """Derivatives of what is returned and of what is seen, in the first row of each block."""

        def along(places):
            tangent = self.state.at[places].set(1)
            return _first_rows(self.linear(tangent, self.draws), states, seen)

        return jax.vmap(along, in_axes=1, out_axes=-1)(jnp.asarray(columns[:, 0]))

    def covariances(self, states: Index | None, seen: Index | None) -> Any:
        """Covariance of what is returned, its covariance with what is seen, and of what is seen.

        With J the derivative along the draws, column i is J Jᵀ e_i.
        """
        response = _squared(partial(self.linear, self.state), self.draws)
        returned, observed = (jnp.zeros_like(part) for part in self.at_zero)

        def along_state(places):
            unit = returned.at[places].set(1)
            return _first_rows(response(unit, observed), states, None)[0]

        def along_seen(places):
            unit = observed.at[places].set(1)
            return _first_rows(response(returned, unit), states, seen)

        drift = cross = noise = None
        if states is not None:
            drift = jax.vmap(along_state, in_axes=1, out_axes=-1)(jnp.asarray(states[:, 0]))
        if seen is not None:
            cross, noise = jax.vmap(along_seen, in_axes=1, out_axes=-1)(jnp.asarray(seen[:, 0]))
        return drift, cross, noise


def noise_response(
    run: AffineMap, state: Vector, draws: Vector
) -> Callable[[Vector, Vector], tuple[Vector, Vector]]:
    """The covariance of (returned, observed) as a linear operator, J Jᵀ."""
    return _squared(jax.linearize(partial(run, state), draws)[1], draws)


def _squared(
    forward: Callable[[Vector], tuple[Vector, Vector]], draws: Vector
) -> Callable[[Vector, Vector], tuple[Vector, Vector]]:
    backward = jax.linear_transpose(forward, draws)
    return lambda returned, observed: forward(*backward((returned, observed)))


def _first_rows(outcome: tuple[Vector, Vector], states: Index | None, seen: Index | None):
    returned, observed = outcome
    return (
        None if states is None else returned[states[:, 0]],
        None if seen is None else observed[seen[:, 0]],
    )


def _zeros(memory: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float), memory)
