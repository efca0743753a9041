"""What a reduction costs against the exact posterior, as verification measures it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_filters import EXACT_NAMES, NAMES, by_name, catalogue_filter

from design_models import CATALOGUE
from design_models.policy import Exact
from inference.divergence import gaussian_divergence, reduction_cost

REDUCED = tuple(name for name in NAMES if name not in EXACT_NAMES)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@by_name(REDUCED)
def test_every_reduction_of_the_catalogue_has_a_finite_positive_cost(name):
    exact = catalogue_filter(name)
    stream = exact.model.draw_inputs(jax.random.key(2), 5)
    cost = reduction_cost(exact, CATALOGUE[name].policy, stream, jax.random.key(3))
    assert np.isfinite(cost)
    assert cost > 0


def test_the_exact_policy_costs_nothing():
    exact = catalogue_filter("bayesian_layer")
    stream = exact.model.draw_inputs(jax.random.key(2), 5)
    cost = reduction_cost(exact, Exact(), stream, jax.random.key(3))
    assert cost == pytest.approx(0, abs=1e-12)


def test_divergence_is_the_textbook_one():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 3, 3))
    first, second = factors @ factors.transpose(0, 2, 1) + np.eye(3)
    mean, other = rng.normal(size=(2, 3))
    inverse, step = np.linalg.inv(second), other - mean
    logs = np.log(np.linalg.det(second) / np.linalg.det(first))
    expected = (np.trace(inverse @ first) - 3 + step @ inverse @ step + logs) / 2
    found = gaussian_divergence(*(jnp.asarray(part) for part in (mean, first, other, second)))
    assert float(found) == pytest.approx(expected)
