"""Covariance policies: what a reduction does to the exact filter's covariance.

A recurrence of the catalogue is the exact filter of its design model with the covariance replaced,
before the write (`prepare`), after it (`conclude`), or not at all. The write itself is always the
exact conditioning on the observation under the prepared covariance.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from design_models import ModelError
from design_models.policy import Diagonal, Exact, Forget, Isotropic, Policy, Reset

from .kalman import Scalar, advance, condition, predict
from .linear_gaussian import Belief, Observation, Observed, Step


def advance_under(
    policy: Policy,
    belief: Belief,
    prior: Belief,
    step: Step,
    observed: Observed,
    u: Mapping[str, Array],
) -> tuple[Belief, Scalar]:
    """One step under a policy; also the log density of the observations under its own belief.

    Raises:
        ModelError: a policy other than exact on a model whose evidence is about the change.
    """
    if isinstance(policy, Exact):
        return advance(belief, step, observed)
    if step.evidence is not None or step.observation is None or observed.observation is None:
        raise ModelError(
            f"`policy` is {policy}; it acts before an observation of the memory, and this model "
            "observes the change itself."
        )
    predicted = predict(belief, step)
    log_evidence = jnp.zeros((), belief.mean.dtype)
    for given, seen in _one_by_one(policy, step.observation, observed.observation):
        prepared = prepare(policy, predicted, prior, u)
        posterior, added = condition(prepared, given, seen)
        predicted = conclude(policy, prepared, posterior, given)
        log_evidence += added
    return predicted, log_evidence


def prepare(policy: Policy, predicted: Belief, prior: Belief, u: Mapping[str, Array]) -> Belief:
    """The belief that a policy writes with, from the exactly predicted one.

    Raises:
        ModelError: the input that holds a forget rate is missing.
    """
    identity = jnp.eye(predicted.mean.shape[-1], dtype=predicted.mean.dtype)
    match policy:
        case Reset(variance):
            covariance = jnp.broadcast_to(variance * identity, predicted.covariance.shape)
            return Belief(predicted.mean, covariance)
        case Forget(rate):
            if rate not in u:
                raise ModelError(f'`policy` is {policy}; the inputs need "{rate}", its rate.')
            return _forget(predicted, prior, u[rate])
        case Diagonal():
            return Belief(predicted.mean, predicted.covariance * identity)
        case Isotropic():
            trace = jnp.trace(predicted.covariance, axis1=-2, axis2=-1)[..., None, None]
            return Belief(predicted.mean, trace / len(identity) * identity)
        case _:
            return predicted


def conclude(policy: Policy, prepared: Belief, posterior: Belief, given: Observation) -> Belief:
    """The belief that a policy carries on, from the exact posterior of the prepared one."""
    width = prepared.mean.shape[-1]
    identity = jnp.eye(width, dtype=prepared.mean.dtype)
    variance = jnp.diagonal(prepared.covariance, axis1=-2, axis2=-1)
    noise = jnp.diagonal(given.noise, axis1=-2, axis2=-1)[..., None]
    information = jnp.sum(given.observation**2 / noise, axis=-2)
    match policy:
        case Diagonal(count):
            count = width if count is None else count
            precision = 1 / variance + count * information
        case Isotropic(count):
            count = width if count is None else count
            precision = 1 / variance + count * jnp.mean(information, axis=-1, keepdims=True)
        case _:
            return posterior
    return Belief(posterior.mean, identity / precision[..., None, :])


def _forget(posterior: Belief, prior: Belief, rate: Float[Array, ""]) -> Belief:
    """Mix natural parameters, rate * posterior + (1 - rate) * prior."""
    kept = jnp.linalg.inv(posterior.covariance)
    restored = jnp.linalg.inv(prior.covariance)
    precision = rate * kept + (1 - rate) * restored
    information = rate * posterior.mean @ kept + (1 - rate) * prior.mean @ restored
    return Belief(jnp.linalg.solve(precision, information.mT).mT, jnp.linalg.inv(precision))


def _one_by_one(
    policy: Policy, given: Observation, seen: Float[Array, "block row seen"]
) -> list[tuple[Observation, Float[Array, "block row 1"]]]:
    """A reset comes before each observation of a step; other policies take all at once."""
    count = seen.shape[-1]
    if not isinstance(policy, Reset) or count == 1:
        return [(given, seen)]
    return [
        (
            Observation(
                given.observation[..., i : i + 1, :],
                given.shift[..., i : i + 1],
                given.noise[..., i : i + 1, i : i + 1],
            ),
            seen[..., i : i + 1],
        )
        for i in range(count)
    ]
