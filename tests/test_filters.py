"""The exact filters against joint conditioning, a textbook recursion, and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from design_models import CATALOGUE
from design_models.policy import Exact
from inference.claim import claimant
from inference.derivation import derive
from inference.kalman import advance_factor
from inference.linear_gaussian import FactorBelief, Observation, Observed, Step
from inference.oracles import joint, textbook
from inference.oracles.program import Program
from inference.smoothing import smooth

EXACT = [name for name, entry in CATALOGUE.items() if isinstance(entry.policy, Exact)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def scene(model, steps):
    inputs = model.draw_inputs(jax.random.key(3), steps)
    _, _, seen = Program(model, inputs).simulate(jax.random.key(4))
    return inputs, seen


@pytest.mark.parametrize("name", EXACT)
def test_one_step_agrees_with_joint_conditioning(name):
    model = CATALOGUE[name].model()
    inputs, seen = scene(model, 1)
    for check in joint.judge(model, claimant(derive(model)), inputs, seen):
        assert check.statistic <= 1e-10, check


@pytest.mark.parametrize("name", ["bayesian_layer", "kalman_linear_attention"])
def test_two_hundred_steps_agree_with_the_textbook_recursion(name):
    model = CATALOGUE[name].model(2, 2)
    inputs = model.draw_inputs(jax.random.key(5), 200)
    exact = derive(model)
    seen = exact.observations(inputs)
    claim = jax.jit(claimant(exact))(inputs, seen)
    means, covariances = textbook.recursion(model, Exact(), inputs, np.asarray(seen))
    np.testing.assert_allclose(claim.means, means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(claim.covariances, covariances, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_factor_form_is_covariance_form(name):
    model = CATALOGUE[name].model()
    inputs = model.draw_inputs(jax.random.key(6), 12)
    exact = derive(model)
    plain, factor = exact.run(inputs), exact.run(inputs, form="factor")
    np.testing.assert_allclose(factor.means, plain.means, atol=1e-11)
    np.testing.assert_allclose(factor.covariances, plain.covariances, atol=1e-11)
    np.testing.assert_allclose(factor.log_evidence, plain.log_evidence, atol=1e-9)


def test_factor_form_keeps_definiteness_in_float32_over_ten_thousand_correlated_writes():
    width, writes, noise, prior_variance = 16, 10_000, 1e-6, 100.0
    rng = np.random.default_rng(0)
    common = rng.normal(size=width)
    common /= np.linalg.norm(common)
    own = rng.normal(size=(writes, width))
    own -= np.outer(own @ common, common)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    keys = np.sqrt(0.9) * common + np.sqrt(0.1) * own  # cosine 0.9 between any two, on average

    def run(dtype):
        zero, identity = jnp.zeros((1, width, width), dtype), jnp.eye(width, dtype=dtype)[None]

        def body(belief, key):
            given = Observation(
                key[None, None], jnp.zeros((1, 1, 1), dtype), jnp.full((1, 1, 1), noise, dtype)
            )
            step = Step(identity, jnp.zeros((1, 1, width), dtype), zero, None, given)
            observed = Observed(None, jnp.ones((1, 1, 1), dtype))
            return advance_factor(belief, step, observed)[0], None

        start = FactorBelief(jnp.zeros((1, 1, width), dtype), jnp.sqrt(prior_variance) * identity)
        start = FactorBelief(start.mean, start.cholesky.astype(dtype))
        return jax.jit(lambda keys: jax.lax.scan(body, start, keys)[0])(keys.astype(dtype))

    factor = run(np.float32)
    diagonal = np.abs(np.diagonal(np.asarray(factor.cholesky)[0]))
    assert factor.cholesky.dtype == jnp.float32
    assert np.all(np.isfinite(np.asarray(factor.cholesky)))
    assert np.all(diagonal > 0)
    exact = np.asarray(run(np.float64).covariance)
    error = np.max(np.abs(np.asarray(factor.covariance) - exact)) / np.max(np.abs(exact))
    assert error < 1e-2, error


def test_smoothing_agrees_with_filtering_at_the_end():
    model = CATALOGUE["bayesian_layer"].model()
    inputs = model.draw_inputs(jax.random.key(7), 6)
    exact = derive(model)
    smoothed, filtered = smooth(exact, inputs), exact.run(inputs).beliefs
    np.testing.assert_allclose(smoothed.mean[-1], filtered.mean[-1], atol=1e-12)
    early = jnp.trace(smoothed.covariance[0, 0]) < jnp.trace(filtered.covariance[0, 0])
    assert bool(early), "later observations make the first memory surer"


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_compiled_paths_of_the_catalogue_are_those_of_the_derived_structure(name):
    entry = CATALOGUE[name]
    assert entry.paths == derive(entry.model()).structure.paths
