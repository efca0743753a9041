"""Statistics that are standard normal on average when a Gaussian claim is right."""

import numpy as np
from jaxtyping import Float
from scipy import stats

from .check import Check

FALSE_ALARM = 1e-3
"""Probability that an oracle of draws rejects an exact filter, over all its statistics."""

_SMALLEST_VARIANCE = 1e-12
_MOST_DIRECTIONS = 24

Draws = Float[np.ndarray, "..."]


def whiten(
    draws: Draws, mean: Float[np.ndarray, " entry"], covariance: Float[np.ndarray, "entry entry"]
) -> Draws | None:
    """Errors in standard deviations, per direction in which the claim is uncertain.

    Directions of no claimed variance are dropped when the draws agree, as for a memory that holds
    a deterministic part. Many directions are projected on a few random ones.

    Returns:
        None where the claim is impossible: not finite, negative variance, or no variance where
        the draws vary.
    """
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(covariance))):
        return None
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = _SMALLEST_VARIANCE * max(values[-1], 1e-300)
    errors = (draws - mean) @ vectors
    known = values <= floor
    if np.any(values < -floor):
        return None
    if np.any(np.abs(errors[..., known]) > 1e-6 * max(1.0, float(np.max(np.abs(draws))))):
        return None
    white = errors[..., ~known] / np.sqrt(values[~known])
    count = white.shape[-1]
    if count > _MOST_DIRECTIONS:
        directions = np.random.default_rng(0).normal(size=(count, _MOST_DIRECTIONS))
        white = white @ np.linalg.qr(directions)[0]
    return white


def moments(white: Draws) -> Draws:
    """First moments, centred squares along two bases, and their sum: all of mean zero."""
    count = white.shape[-1]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(count, count)))[0]
    rotated = white @ rotation
    omnibus = np.sum(white**2, axis=-1, keepdims=True) - count
    return np.concatenate([white, white**2 - 1, rotated**2 - 1, omnibus], axis=-1)


def largest(
    oracle: str, quantity: str, scores: Float[np.ndarray, " statistic"], total: int
) -> Check:
    """Check the largest of several z scores; `total` counts all that the oracle looks at."""
    threshold = float(stats.norm.isf(FALSE_ALARM / (2 * total)))
    worst = float(np.max(np.abs(scores), initial=0))
    worst = float("inf") if np.isnan(worst) else worst
    return Check(oracle, quantity, worst, threshold, "standard errors")


def impossible(oracle: str, quantity: str) -> Check:
    """A claim that cannot be: its covariance is not a covariance."""
    return Check(oracle, quantity, float("inf"), 0.0, "standard errors")
