r"""Smoothing: what all observations, later ones too, say about each step's memory.

With $(x_{t-1}, x_t)$ jointly Gaussian given the observations up to t, mean $(m, m')$ and
covariance blocks $P_{11}, P_{12}, P_{22}$, and $G = P_{12} P_{22}^{-1}$,

$$ m^s_{t-1} = m + G (m^s_t - m'),\quad P^s_{t-1} = P_{11} + G (P^s_t - P_{22}) G^\top. $$

Source: Rauch, Tung & Striebel (1965), for a step whose change may itself be observed.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .exact_filter import ExactFilter
from .kalman import advance
from .linear_gaussian import Belief, Evidence, Observation, Observed, Step


def smooth(exact: ExactFilter, inputs: Mapping[str, Array]) -> Belief:
    """Beliefs about the memory after each step, given the whole sequence, in blocks.

    Returns:
        A `Belief` with a leading time axis; exact.

    Raises:
        ModelError: as `ExactFilter.run`.
    """
    exact.check(inputs)
    steps = jax.vmap(exact.coefficients)(dict(inputs))
    observed = jax.vmap(exact.observed)(dict(inputs))

    def forward(belief: Belief, moment: tuple[Step, Observed]):
        pair, _ = advance(_with_past(belief), _past_kept(moment[0]), moment[1])
        width = belief.mean.shape[-1]
        later = Belief(pair.mean[..., width:], pair.covariance[..., width:, width:])
        return later, pair

    last, pairs = jax.lax.scan(forward, exact.initial(), (steps, observed))

    def backward(later: Belief, pair: Belief):
        width = later.mean.shape[-1]
        tie = pair.covariance[..., :width, width:]
        # A memory that holds a deterministic part has a singular covariance: least squares.
        gain = tie @ jnp.linalg.pinv(pair.covariance[..., width:, width:], hermitian=True)
        mean = pair.mean[..., :width] + (later.mean - pair.mean[..., width:]) @ gain.mT
        change = later.covariance - pair.covariance[..., width:, width:]
        covariance = pair.covariance[..., :width, :width] + gain @ change @ gain.mT
        return Belief(mean, covariance), later

    return jax.lax.scan(backward, last, pairs, reverse=True)[1]


def _with_past(belief: Belief) -> Belief:
    """The memory twice over, as (past, present)."""
    mean = jnp.concatenate([belief.mean, belief.mean], axis=-1)
    covariance = jnp.tile(belief.covariance, (1, 2, 2))
    return Belief(mean, covariance)


def _past_kept(step: Step) -> Step:
    """The same step on (past, present): the past becomes the memory before the step."""
    width = step.transition.shape[-1]
    zero = jnp.zeros_like(step.transition)
    identity = jnp.broadcast_to(jnp.eye(width, dtype=zero.dtype), zero.shape)

    def square(corner: Array, first: Array) -> Array:
        top = jnp.concatenate([zero, first], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([zero, corner], axis=-1)], axis=-2)

    def present(matrix: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(matrix), matrix], axis=-1)

    evidence, observation = step.evidence, step.observation
    if evidence is not None:
        cross = jnp.concatenate([jnp.zeros_like(evidence.cross), evidence.cross], axis=-2)
        matrix = present(evidence.observation)
        evidence = Evidence(matrix, evidence.shift, evidence.noise, cross)
    if observation is not None:
        matrix = present(observation.observation)
        observation = Observation(matrix, observation.shift, observation.noise)
    shift = jnp.concatenate([jnp.zeros_like(step.shift), step.shift], axis=-1)
    return Step(
        square(step.transition, identity), shift, square(step.drift, zero), evidence, observation
    )
