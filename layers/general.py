r"""Any verified filter, token by token or parallel in time.

Parallel in time, a token is an element (`layers.elements`): the memory after it given that before
it, N(A s + b, C), and what it says about that before it, in information form. A change that is
itself observed, z = H s + e with cov(w, e) = C, is first put as an observation of s and a change of
which nothing is seen: F − C R⁻¹ H, Q − C R⁻¹ Cᵀ.

Source: Särkkä & García-Fernández (2021), IEEE TAC 66(1), eqs. 10-17.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from design_models.policy import Exact, Forget, Policy
from inference.exact_filter import ExactFilter, Prediction
from inference.kalman import advance
from inference.linear_gaussian import Belief, Evidence, Observation, Observed, Step
from inference.policies import advance_under

from .elements import Element, apply, combine, solve
from .precision import in_range
from .scans import Algorithm


def general_scan(
    exact: ExactFilter,
    policy: Policy,
    inputs: Mapping[str, Array],
    initial: Belief,
    starts: Bool[Array, " time"] | None,
    mask: Bool[Array, " time"] | None,
    algorithm: Algorithm,
) -> tuple[Belief, Prediction, Float[Array, " time"]]:
    """Belief after the last token, every token's reading, and log evidence."""
    inputs = dict(inputs)
    steps = jax.vmap(exact.coefficients)(inputs)
    observed = jax.vmap(exact.observed)(inputs)
    prior = exact.initial()
    if isinstance(policy, Exact | Forget):
        steps = _checked(steps, prior)
    time = jax.tree.leaves(inputs)[0].shape[0]

    def pick(condition, first, second):
        """`first` where the condition holds, token by token; `second` where there is none."""
        if condition is None:
            return second
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)

    if algorithm == "token" or time == 0:

        def body(belief, moment):
            step, seen, u, begins, padding = moment
            before = pick(begins, prior, belief)
            after, added = advance_under(policy, before, prior, step, seen, u)
            after, added = pick(padding, (before, jnp.zeros_like(added)), (after, added))
            return after, (after, added)

        padding = None if mask is None else ~mask
        last, (beliefs, evidence) = jax.lax.scan(
            body, initial, (steps, observed, inputs, starts, padding)
        )
    else:
        elements = jax.vmap(_element)(steps, observed)
        if starts is not None:
            anew = jax.vmap(_from_prior, (0, 0, None))(steps, observed, prior)
            elements = jax.vmap(pick)(starts, anew, elements)
        if mask is not None:
            elements = jax.vmap(pick, (0, None, 0))(~mask, _nothing(initial), elements)
        prefixes = jax.lax.associative_scan(combine, elements)
        along = jax.vmap(apply, (0, None, None))
        ends = Belief(*along(prefixes, initial.mean, initial.covariance))
        before = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), initial, ends
        )
        if starts is not None:
            before = jax.vmap(pick, (0, None, 0))(starts, prior, before)
        beliefs, evidence = jax.vmap(advance)(before, steps, observed)
        if mask is not None:
            beliefs = jax.vmap(pick)(~mask, before, beliefs)
            evidence = jnp.where(mask, evidence, 0)
        last = jax.tree.map(lambda leaf: leaf[-1], beliefs)
    reads = jax.vmap(exact.read)(beliefs, inputs)
    if mask is not None:
        reads = jax.tree.map(lambda part: jnp.where(mask[:, None], part, 0), reads)
    return last, reads, evidence


def _checked(steps: Step, prior: Belief) -> Step:
    """Refuse noise that is too small for a float32 covariance of several entries."""
    if prior.covariance.shape[-1] == 1:  # a variance alone keeps its digits
        return steps
    largest = jnp.max(jnp.diagonal(prior.covariance, axis1=-2, axis2=-1), axis=-1)

    def check(given: Evidence | Observation | None):
        if given is None:
            return None
        seen = largest[:, None] * jnp.sum(given.observation**2, axis=-1)
        own = jnp.arange(seen.shape[-1])
        noise = in_range(given.noise[..., own, own], seen)
        return replace(given, noise=given.noise.at[..., own, own].set(noise))

    return replace(steps, evidence=check(steps.evidence), observation=check(steps.observation))


def _element(step: Step, observed: Observed) -> Element:
    transition, shift, drift = step.transition, step.shift, step.drift
    information = jnp.zeros_like(shift)
    precision = jnp.zeros_like(drift)
    if step.evidence is not None and observed.evidence is not None:
        given = step.evidence
        surprise = observed.evidence - given.shift
        gain = solve(given.noise, given.cross.mT).mT
        weighted = solve(given.noise, given.observation)
        transition = transition - gain @ given.observation
        shift = shift + surprise @ gain.mT
        drift = drift - gain @ given.cross.mT
        information = surprise @ weighted
        precision = given.observation.mT @ weighted
    if step.observation is None or observed.observation is None:
        return Element(transition, shift, drift, information, precision)
    given = step.observation
    variance = given.observation @ drift @ given.observation.mT + given.noise
    gain = solve(variance, given.observation @ drift).mT
    innovation = observed.observation - given.shift - shift @ given.observation.mT
    moved = given.observation @ transition
    weighted = solve(variance, moved)
    kept = jnp.eye(drift.shape[-1]) - gain @ given.observation
    return Element(
        kept @ transition,
        shift + innovation @ gain.mT,
        kept @ drift,
        information + innovation @ weighted,
        precision + moved.mT @ weighted,
    )


def _from_prior(step: Step, observed: Observed, prior: Belief) -> Element:
    """The element of a token before which the memory is the prior, whatever it was."""
    belief, _ = advance(prior, step, observed)
    zero = jnp.zeros_like(belief.covariance)
    return Element(zero, belief.mean, belief.covariance, jnp.zeros_like(belief.mean), zero)


def _nothing(belief: Belief) -> Element:
    """The element of a token that is not there."""
    zero, none = jnp.zeros_like(belief.covariance), jnp.zeros_like(belief.mean)
    identity = jnp.broadcast_to(jnp.eye(zero.shape[-1], dtype=zero.dtype), zero.shape)
    return Element(identity, none, zero, none, zero)
