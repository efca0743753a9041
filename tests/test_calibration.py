"""Calibration: scores against integrals, and verdicts on predictions that are honest or not."""

import numpy as np
import pytest
from scipy import integrate, stats

from design_models import ModelError
from inference.calibration import (
    calibration,
    coverage,
    crps,
    log_score,
    nats_lost,
    pit,
    pit_distribution,
    reliability,
    uniformity,
)


def drawn(count: int, spread: float = 1.0):
    """Predictions of varying doubt, and truths `spread` times as far off as stated."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=count), rng.uniform(0.1, 3, count)
    return mean, variance, mean + spread * np.sqrt(variance) * rng.normal(size=count)


@pytest.mark.parametrize("truth", [-1.7, 0.4, 3.0])
def test_crps_is_the_integral_it_stands_for(truth):
    law = stats.norm(0.3, 1.4)
    below = integrate.quad(lambda x: law.cdf(x) ** 2, -np.inf, truth)[0]
    above = integrate.quad(lambda x: law.sf(x) ** 2, truth, np.inf)[0]
    found = crps(np.array(0.3), np.array(1.4**2), np.array(truth))
    assert found == pytest.approx(below + above, abs=1e-8)


def test_transform_and_log_score_are_those_of_the_normal_law():
    mean, variance, truth = drawn(20)
    law = stats.norm(mean, np.sqrt(variance))
    np.testing.assert_allclose(pit(mean, variance, truth), law.cdf(truth), rtol=1e-12)
    np.testing.assert_allclose(log_score(mean, variance, truth), law.logpdf(truth), rtol=1e-12)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_a_wrong_spread_shows_as_predicted(spread):
    count = 40_000
    mean, variance, truth = drawn(count, spread)
    transforms, honest = pit(mean, variance, truth), spread**2 * variance
    levels = np.array([0.05, 0.3, 0.5, 0.95])
    shares = np.mean(transforms[:, None] <= levels, axis=0)
    np.testing.assert_allclose(
        pit_distribution(levels, variance.mean(), honest.mean()), shares, atol=0.01
    )
    found = calibration(mean, variance, truth)
    within = pit_distribution(np.array([0.05, 0.95]), variance.mean(), honest.mean())
    assert found.coverage == pytest.approx(within[1] - within[0], abs=0.01)
    assert found.error_ratio == pytest.approx(spread**2, rel=0.03)
    lost = np.mean(log_score(mean, honest, truth) - log_score(mean, variance, truth))
    assert np.mean(nats_lost(variance, honest)) == pytest.approx(lost, abs=0.03)
    best = calibration(mean, honest, truth)
    assert found.crps >= best.crps
    assert found.log_score <= best.log_score


def test_uniformity_is_refused_to_a_memory_that_is_ten_percent_off_and_granted_to_an_honest_one():
    assert uniformity(pit(*drawn(4000))) > 0.01
    assert uniformity(pit(*drawn(4000, 1.1))) < 1e-3


def test_the_largest_gap_is_that_of_kolmogorov():
    mean, variance, truth = drawn(50, 1.5)
    expected = stats.kstest(pit(mean, variance, truth), "uniform").statistic
    assert calibration(mean, variance, truth).pit_gap == pytest.approx(expected)


def test_reliability_sorts_by_what_is_stated_and_keeps_every_number():
    mean, variance, truth = drawn(4000, 2.0)
    found = reliability(mean, variance, truth, bins=8)
    assert np.all(np.diff(found.stated) > 0)
    assert np.mean(found.found) == pytest.approx(np.mean((truth - mean) ** 2))
    np.testing.assert_array_less(np.abs(found.found - 4 * found.stated), 5 * found.error)


def test_coverage_of_every_level_is_the_level_for_uniform_transforms():
    transforms = (np.arange(1000) + 0.5) / 1000
    for level in (0.1, 0.5, 0.9):
        assert coverage(transforms, level) == pytest.approx(level)


def test_a_variance_without_doubt_is_refused():
    ones = np.ones(3)
    with pytest.raises(ModelError, match="`variance` is not positive in 1 of 3"):
        calibration(ones, np.array([1.0, 0.0, 2.0]), ones)
    with pytest.raises(ModelError, match="`truth` is empty"):
        calibration(ones[:0], ones[:0], ones[:0])
    with pytest.raises(ModelError, match="`bins` is 4"):
        reliability(ones, ones, ones, bins=4)
