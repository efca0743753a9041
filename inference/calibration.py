r"""Is a Gaussian prediction as sure as it should be?

A memory says $N(m, s^2)$ of every number, and the truth $y$ comes out. Its probability integral
transform $u = \Phi((y - m)/s)$ is uniform for an honest memory. Where errors have mean 0 and
variance $\sigma^2$ instead of the stated $s^2$, everything follows from the ratio of the two
(`pit_distribution`, `nats_lost`): that is how miscalibration is predicted before it is measured.

Source: Dawid (1984), "Statistical theory: the prequential approach"; Gneiting & Raftery (2007),
"Strictly proper scoring rules, prediction, and estimation", eqs. 1 and 21.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from design_models import ModelError

INTERVAL = 0.9
"""Probability of the central intervals whose coverage is reported."""

Numbers = Float[np.ndarray, "..."] | float


def pit(mean: Numbers, variance: Numbers, truth: Numbers) -> Numbers:
    r"""Probability integral transforms $\Phi((y - m)/s)$: uniform where predictions are honest.

    Raises:
        ModelError: a variance is not positive.
    """
    return ndtr(_in_deviations(mean, variance, truth))


def pit_distribution(levels: Numbers, stated: Numbers, found: Numbers) -> Numbers:
    r"""Share of transforms up to each level, where errors are Gaussian of mean 0.

    $$ P(u \le p) = \Phi(\Phi^{-1}(p)\, s/\sigma) $$

    Args:
        levels: p.
        stated: s², variance that is claimed.
        found: σ², variance that errors have.
    """
    return ndtr(ndtri(levels) * np.sqrt(stated / found))


def coverage(transforms: Numbers, level: float = INTERVAL) -> float:
    """How often the central interval of probability `level` holds the truth."""
    return float(np.mean(np.abs(2 * transforms - 1) <= level))


def uniformity(transforms: Float[np.ndarray, " number"]) -> float:
    """Probability that uniform transforms look no more uniform than these, by ArviZ.

    The test that `arviz.plot_ecdf_pit` draws by default ("pot_c"), which allows for dependence
    between transforms.

    Source: Tesso et al. (2026), arXiv 2603.02928.
    """
    from arviz_stats.base.array import array_stats  # layers and training do without ArviZ

    return float(array_stats.uniformity_test(np.ravel(transforms))[0])


def log_score(mean: Numbers, variance: Numbers, truth: Numbers) -> Numbers:
    r"""Log density of the truth, in nats: $-\tfrac12 (\log 2\pi s^2 + (y - m)^2/s^2)$.

    The larger the better; on average largest for the truth's own distribution.

    Raises:
        ModelError: a variance is not positive.
    """
    deviations = _in_deviations(mean, variance, truth)
    return -0.5 * (np.log(2 * np.pi * variance) + deviations**2)


def nats_lost(stated: Numbers, found: Numbers) -> Numbers:
    r"""What a wrong variance costs a number's log score on average, where the mean is kept.

    $$ \tfrac12 (\sigma^2/s^2 - 1 - \log \sigma^2/s^2) $$

    Args:
        stated: s², variance that is claimed.
        found: σ², variance that errors have.
    """
    ratio = found / stated
    return 0.5 * (ratio - 1 - np.log(ratio))


def crps(mean: Numbers, variance: Numbers, truth: Numbers) -> Numbers:
    r"""Continuous ranked probability score, in units of the value.

    $$ \int (F(x) - 1[x \ge y])^2 dx = s\,(z (2\Phi(z) - 1) + 2\varphi(z) - 1/\sqrt\pi),\quad
       z = (y - m)/s $$

    The smaller the better; a prediction without doubt scores its absolute error.

    Raises:
        ModelError: a variance is not positive.
    """
    z = _in_deviations(mean, variance, truth)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.sqrt(variance) * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


@dataclass(frozen=True)
class Reliability:
    """Stated and found squared error where predictions are about as sure as each other.

    Args:
        stated: mean variance that is claimed, bin by bin from the surest to the least sure.
        found: mean squared error.
        error: standard error of `found`, as if all numbers were independent.
    """

    stated: Float[np.ndarray, " bin"]
    found: Float[np.ndarray, " bin"]
    error: Float[np.ndarray, " bin"]


def reliability(mean: Numbers, variance: Numbers, truth: Numbers, bins: int = 10) -> Reliability:
    """Squared error against stated variance, in bins of as many numbers each.

    Honest predictions lie on the diagonal, whatever the distribution of errors.

    Raises:
        ModelError: there are fewer numbers than bins.
    """
    parts = np.broadcast_arrays(variance, (truth - mean) ** 2)
    stated, squares = (np.ravel(part) for part in parts)
    if not 1 <= bins <= stated.size:
        raise ModelError(f"`bins` is {bins}; {stated.size} numbers fill from 1 to as many bins.")
    groups = np.array_split(np.argsort(stated, kind="stable"), bins)
    return Reliability(
        np.array([np.mean(stated[group]) for group in groups]),
        np.array([np.mean(squares[group]) for group in groups]),
        np.array([np.std(squares[group]) / np.sqrt(len(group)) for group in groups]),
    )


@dataclass(frozen=True)
class Calibration:
    """How honest and how sharp predictions are, over all numbers predicted.

    Args:
        coverage: of central intervals of probability 0.9.
        error_ratio: mean of squared error over stated variance: 1 for an honest memory, above 1
            for one that is too sure.
        pit_gap: largest distance between the distribution of transforms and the uniform one.
        sharpness: root of the mean stated variance; only comparable between honest predictions.
        log_score: mean, in nats a number; the larger the better.
        crps: mean, in units of the value; the smaller the better.
    """

    coverage: float
    error_ratio: float
    pit_gap: float
    sharpness: float
    log_score: float
    crps: float


def calibration(mean: Numbers, variance: Numbers, truth: Numbers) -> Calibration:
    """Judge predictions N(mean, variance) by the truth; shapes broadcast.

    Raises:
        ModelError: there is nothing to judge, or a variance is not positive.
    """
    mean, variance, truth = (
        np.ravel(np.asarray(part, float)) for part in np.broadcast_arrays(mean, variance, truth)
    )
    if not truth.size:
        raise ModelError("`truth` is empty; calibration needs at least one number.")
    transforms = np.sort(pit(mean, variance, truth))
    above = np.arange(1, truth.size + 1) / truth.size - transforms
    return Calibration(
        coverage=coverage(transforms),
        error_ratio=float(np.mean((truth - mean) ** 2 / variance)),
        pit_gap=float(np.max(np.maximum(above, 1 / truth.size - above))),
        sharpness=float(np.sqrt(np.mean(variance))),
        log_score=float(np.mean(log_score(mean, variance, truth))),
        crps=float(np.mean(crps(mean, variance, truth))),
    )


def _in_deviations(mean: Numbers, variance: Numbers, truth: Numbers) -> Numbers:
    refused = int(np.sum(np.logical_not(np.greater(variance, 0))))
    if refused:
        raise ModelError(
            f"`variance` is not positive in {refused} of {np.size(variance)} numbers; a prediction "
            "needs some doubt."
        )
    return (truth - mean) / np.sqrt(variance)
