r"""The exact Kalman filter, in covariance form and in factor (square-root) form.

Both forms take the same coefficients (`inference.linear_gaussian`) and every function acts on all
blocks and rows at once. The factor form is the reference: it keeps the covariance positive
definite where the other loses it (prior variance over noise above about 1e4 in float32).

Source: Kalman (1960); array form: Kailath, Sayed & Hassibi (2000), ch. 12.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .linear_gaussian import Belief, Evidence, FactorBelief, Observation, Observed, Step

Scalar = Float[Array, ""]


def predict(belief: Belief, step: Step) -> Belief:
    r"""Let one step of time pass: $m^- = F m + f,\; P^- = F P F^\top + Q$."""
    mean = belief.mean @ step.transition.mT + step.shift
    covariance = step.transition @ belief.covariance @ step.transition.mT + step.drift
    return Belief(mean, covariance)


def condition(
    belief: Belief, given: Observation, observed: Float[Array, "block row seen"]
) -> tuple[Belief, Scalar]:
    r"""Absorb observed values, by the Joseph form; also return their log density.

    $$ S = H P H^\top + R,\quad G = P H^\top S^{-1},\quad m' = m + G(y - H m - h),\quad
       P' = (I - G H) P (I - G H)^\top + G R G^\top $$
    """
    cross = belief.covariance @ given.observation.mT
    factor = jnp.linalg.cholesky(given.observation @ cross + given.noise)
    gain = _solve(factor, cross.mT).mT
    innovation = observed - belief.mean @ given.observation.mT - given.shift
    kept = jnp.eye(gain.shape[-2], dtype=gain.dtype) - gain @ given.observation
    covariance = kept @ belief.covariance @ kept.mT + gain @ given.noise @ gain.mT
    posterior = Belief(belief.mean + innovation @ gain.mT, covariance)
    return posterior, _log_density(factor, innovation)


def predict_given_evidence(
    belief: Belief, step: Step, given: Evidence, observed: Float[Array, "block row seen"]
) -> tuple[Belief, Scalar]:
    r"""Let one step pass whose change is itself observed, z = H x + h + e with cov(w, e) = C.

    $$ S = H P H^\top + R,\quad G = (F P H^\top + C) S^{-1},\quad
       P' = A P A^\top + Q - C G^\top - G C^\top + G R G^\top,\; A = F - G H $$
    """
    projected = belief.covariance @ given.observation.mT
    factor = jnp.linalg.cholesky(given.observation @ projected + given.noise)
    gain = _solve(factor, (step.transition @ projected + given.cross).mT).mT
    innovation = observed - belief.mean @ given.observation.mT - given.shift
    closed = step.transition - gain @ given.observation
    shared = given.cross @ gain.mT
    covariance = (
        closed @ belief.covariance @ closed.mT
        + (step.drift - shared - shared.mT)
        + gain @ given.noise @ gain.mT
    )
    mean = belief.mean @ step.transition.mT + step.shift + innovation @ gain.mT
    return Belief(mean, covariance), _log_density(factor, innovation)


def advance(belief: Belief, step: Step, observed: Observed) -> tuple[Belief, Scalar]:
    """One exact step, predict and update, in covariance form; also the log evidence it adds."""
    log_evidence = jnp.zeros((), belief.mean.dtype)
    if step.evidence is not None and observed.evidence is not None:
        belief, added = predict_given_evidence(belief, step, step.evidence, observed.evidence)
        log_evidence += added
    else:
        belief = predict(belief, step)
    if step.observation is not None and observed.observation is not None:
        belief, added = condition(belief, step.observation, observed.observation)
        log_evidence += added
    return belief, log_evidence


def advance_factor(
    belief: FactorBelief, step: Step, observed: Observed
) -> tuple[FactorBelief, Scalar]:
    r"""One exact step in factor form; also the log evidence it adds.

    $[\,F L\;\; Q^{1/2}\,]$ times its transpose is the predicted covariance, and
    $[\,R^{1/2}\; H L;\; 0\; L\,]$ times its transpose the joint covariance of (observed, state).
    Triangularising the second yields $S^{1/2}$, the gain times it, and the posterior factor.
    """
    log_evidence = jnp.zeros((), belief.mean.dtype)
    moved = step.transition @ belief.cholesky
    predicted_mean = belief.mean @ step.transition.mT + step.shift
    if step.evidence is not None and observed.evidence is not None:
        given = step.evidence
        noise_below = jnp.concatenate([given.cross, step.drift], axis=-1)
        noise_above = jnp.concatenate([given.noise, given.cross.mT], axis=-1)
        noise = _root(jnp.concatenate([noise_above, noise_below], axis=-2))
        signal = jnp.concatenate([given.observation @ belief.cholesky, moved], axis=-2)
        innovation = observed.evidence - belief.mean @ given.observation.mT - given.shift
        belief, added = _absorb(
            predicted_mean, jnp.concatenate([noise, signal], axis=-1), innovation
        )
        log_evidence += added
    else:
        factor = _triangular(jnp.concatenate([moved, _root(step.drift)], axis=-1))
        belief = FactorBelief(predicted_mean, factor)
    if step.observation is not None and observed.observation is not None:
        given = step.observation
        above = jnp.concatenate(
            [jnp.linalg.cholesky(given.noise), given.observation @ belief.cholesky], axis=-1
        )
        zeros = jnp.zeros((*belief.cholesky.shape[:-1], given.noise.shape[-1]), above.dtype)
        below = jnp.concatenate([zeros, belief.cholesky], axis=-1)
        innovation = observed.observation - belief.mean @ given.observation.mT - given.shift
        belief, added = _absorb(belief.mean, jnp.concatenate([above, below], axis=-2), innovation)
        log_evidence += added
    return belief, log_evidence


def factorise(belief: Belief) -> FactorBelief:
    """The same belief with a factor of its covariance (symmetric root, so it may be singular)."""
    return FactorBelief(belief.mean, _root(belief.covariance))


def _absorb(
    mean: Float[Array, "block row width"],
    joint: Float[Array, "block joint columns"],
    innovation: Float[Array, "block row seen"],
) -> tuple[FactorBelief, Scalar]:
    """Condition on an innovation, given a factor of the joint covariance of (observed, state)."""
    seen = innovation.shape[-1]
    factor = _triangular(joint)
    corner, below = factor[..., :seen, :seen], factor[..., seen:, :seen]
    white = jax.scipy.linalg.solve_triangular(corner, innovation.mT, lower=True)
    posterior = FactorBelief(mean + (below @ white).mT, factor[..., seen:, seen:])
    return posterior, _log_density(corner, innovation)


def _triangular(factor: Float[Array, "block row column"]) -> Float[Array, "block row row"]:
    """A lower-triangular L with L Lᵀ = factor factorᵀ."""
    return jnp.linalg.qr(factor.mT, mode="r").mT


def _root(covariance: Float[Array, "block width width"]) -> Float[Array, "block width width"]:
    """A square root that may be singular: exact for diagonal matrices, else by eigenvectors."""
    identity = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1)[..., None] * identity
    values, vectors = jnp.linalg.eigh(covariance)
    general = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    is_diagonal = jnp.all(covariance == diagonal, axis=(-2, -1), keepdims=True)
    return jnp.where(is_diagonal, jnp.sqrt(diagonal), general)


def _solve(
    factor: Float[Array, "block seen seen"], right: Float[Array, "block seen width"]
) -> Float[Array, "block seen width"]:
    """Solve factor factorᵀ x = right."""
    return jax.scipy.linalg.cho_solve((factor, True), right)


def _log_density(
    factor: Float[Array, "block seen seen"], innovation: Float[Array, "block row seen"]
) -> Scalar:
    """Log density of every row's innovation under N(0, factor factorᵀ), summed."""
    white = jax.scipy.linalg.solve_triangular(factor, innovation.mT, lower=True)
    log_determinant = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))))
    rows = innovation.shape[-2]
    constant = innovation.size * jnp.log(jnp.asarray(2 * jnp.pi, innovation.dtype))
    return -0.5 * (jnp.sum(white**2) + constant) - rows * log_determinant
