"""What a reduction costs against the exact posterior, as verification measures it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from design_models import CATALOGUE
from design_models.policy import Exact
from inference.derivation import draft
from inference.divergence import gaussian_divergence, reduction_cost

REDUCED = [name for name, entry in CATALOGUE.items() if not isinstance(entry.policy, Exact)]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", REDUCED)
def test_every_reduction_of_the_catalogue_has_a_finite_positive_cost(name):
    entry = CATALOGUE[name]
    exact = draft(entry.model())
    stream = exact.model.draw_inputs(jax.random.key(2), 5)
    cost = reduction_cost(exact, entry.policy, stream, jax.random.key(3))
    assert np.isfinite(cost)
    assert cost > 0


def test_the_exact_policy_costs_nothing():
    exact = draft(CATALOGUE["bayesian_layer"].model())
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
