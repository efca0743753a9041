"""Laws of the derived filters, for any keys, values and variances, in float64."""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from design_models import associative_regression, increment_evidence
from design_models.policy import Reset
from inference.derivation import draft
from inference.smoothing import smooth

WIDTHS = st.just((2, 3))
SEEDS = st.integers(0, 2**32 - 1)
STEPS = 5
pytestmark = pytest.mark.xdist_group("laws")
few = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@cache
def filter_of(widths, kind="layer", prior_variance=1.0):
    """A derived filter and what it does to inputs, compiled once for each kind and shape."""
    settings_of = {
        "layer": {"decay": "scalar", "drift": "scalar"},
        "static": {},
        "pairs": {"observations": 2},
        "gated": {"decay": "key", "drift": "key"},
    }
    with jax.enable_x64(True):
        if kind == "increments":
            model = increment_evidence(*widths, decay="scalar", prior_variance=prior_variance)
        else:
            model = associative_regression(
                *widths, **settings_of[kind], prior_variance=prior_variance
            )
        return draft(model)


@cache
def compiled(widths, kind="layer", prior_variance=1.0, form="covariance", policy=None):
    exact = filter_of(widths, kind, prior_variance)
    return jax.jit(lambda inputs: exact.run(inputs, form=form, policy=policy))


def draw(widths, seed, kind="layer") -> dict[str, np.ndarray]:
    """Inputs of any kind of model, free in scale, from NumPy alone."""
    rng, (value_width, key_width) = np.random.default_rng(seed), widths
    each = (STEPS, 2) if kind == "pairs" else (STEPS,)
    inputs = {
        "key": rng.normal(size=(*each, key_width)) * rng.uniform(0.2, 3),
        "value": rng.normal(size=(*each, value_width)) * rng.uniform(0.1, 10),
        "query": rng.normal(size=(STEPS, key_width)),
        "noise": rng.uniform(0.05, 2, each),
    }
    rate = (STEPS, key_width) if kind == "gated" else (STEPS,)
    if kind in ("layer", "gated", "increments"):
        inputs |= {"decay": rng.uniform(0.3, 1, rate), "drift": rng.uniform(0.01, 1, rate)}
    return inputs


def beliefs(filtered) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(filtered.means), np.asarray(filtered.covariances)


def close(found, expected, tolerance=1e-10):
    scale = np.max(np.abs(expected), initial=1e-300)
    np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


# -- order and noise -----------------------------------------------------------------------------


@few
@given(WIDTHS, SEEDS)
def test_the_order_of_writes_does_not_matter_when_nothing_drifts_or_decays(widths, seed):
    run, inputs = compiled(widths, "static"), draw(widths, seed, "static")
    order = np.random.default_rng(seed + 1).permutation(STEPS)
    one = run(inputs)
    other = run({name: array[order] for name, array in inputs.items()})
    for found, expected in zip(beliefs(other), beliefs(one), strict=True):
        close(found[-1], expected[-1])
    close(jnp.sum(other.log_evidence), jnp.sum(one.log_evidence))


@few
@given(WIDTHS, SEEDS)
def test_a_write_of_infinite_noise_changes_nothing(widths, seed):
    run, inputs = compiled(widths, "static"), draw(widths, seed, "static")
    inputs["noise"][-1] = 1e12
    means, covariances = beliefs(run(inputs))
    close(means[-1], means[-2], 1e-9)
    close(covariances[-1], covariances[-2], 1e-9)


@few
@given(WIDTHS, SEEDS)
def test_a_key_of_zero_changes_nothing(widths, seed):
    run, inputs = compiled(widths, "static"), draw(widths, seed, "static")
    inputs["key"][-1] = 0
    means, covariances = beliefs(run(inputs))
    np.testing.assert_array_equal(means[-1], means[-2])
    np.testing.assert_array_equal(covariances[-1], covariances[-2])


@few
@given(WIDTHS, SEEDS, st.sampled_from(["layer", "gated"]))
def test_a_write_lowers_the_variance_in_every_direction(widths, seed, kind):
    inputs = draw(widths, seed, kind)
    _, covariances = beliefs(compiled(widths, kind)(inputs))
    prior = np.eye(widths[1])
    for t, posterior in enumerate(covariances):
        fading = inputs["decay"][t] * np.ones(widths[1])
        predicted = np.diag(fading) @ prior @ np.diag(fading)
        predicted += np.diag(inputs["drift"][t] * np.ones(widths[1]))
        fall = np.linalg.eigvalsh(predicted - posterior)
        assert fall[0] > -1e-12 * np.max(predicted)
        assert fall[-1] > 0
        assert np.linalg.eigvalsh(posterior)[0] > 0
        prior = posterior


@few
@given(WIDTHS, SEEDS)
def test_the_covariance_does_not_depend_on_the_values(widths, seed):
    run, inputs = compiled(widths), draw(widths, seed)
    other = {**inputs, "value": np.random.default_rng(seed + 1).normal(size=inputs["value"].shape)}
    np.testing.assert_array_equal(run(other).covariances, run(inputs).covariances)


# -- against closed forms ------------------------------------------------------------------------


@few
@given(WIDTHS, SEEDS)
def test_a_memory_that_neither_decays_nor_drifts_is_ridge_regression(widths, seed):
    inputs = draw(widths, seed, "static")
    means, covariances = beliefs(compiled(widths, "static")(inputs))
    keys, values, weight = inputs["key"], inputs["value"], 1 / inputs["noise"]
    for t in range(STEPS):
        k, v, w = keys[: t + 1], values[: t + 1], np.diag(weight[: t + 1])
        covariance = np.linalg.inv(np.eye(widths[1]) + k.T @ w @ k)
        close(covariances[t], covariance)
        close(means[t], v.T @ w @ k @ covariance)


@few
@given(WIDTHS, SEEDS)
def test_decay_one_and_drift_zero_is_the_static_memory(widths, seed):
    inputs = draw(widths, seed)
    inputs["decay"][:], inputs["drift"][:] = 1, 0
    still, layer = compiled(widths, "static")(inputs), compiled(widths)(inputs)
    close(layer.means, still.means)
    close(layer.covariances, still.covariances)


def joint(inputs, widths, kind):
    """Joint law of all memories and values of one row: means are zero; covariances (state, seen).

    The memories are written as sums of decayed innovations, the prior's being the first.
    """
    key_width = widths[1]
    decay = [a * np.ones(key_width) for a in inputs.get("decay", np.ones(STEPS))]
    drift = [q * np.ones(key_width) for q in inputs.get("drift", np.zeros(STEPS))]
    maps = np.zeros((STEPS, key_width, STEPS + 1, key_width))
    last = np.zeros((key_width, STEPS + 1, key_width))
    last[:, 0] = np.eye(key_width)
    for t in range(STEPS):
        last = decay[t][:, None, None] * last
        last[:, t + 1] += np.eye(key_width)
        maps[t] = last
    spread = np.concatenate([np.ones(key_width), *drift])
    flat = maps.reshape(STEPS * key_width, -1)
    memories = flat @ np.diag(spread) @ flat.T
    read = np.zeros((STEPS, STEPS, key_width))
    read[range(STEPS), range(STEPS)] = inputs["key"]
    read = read.reshape(STEPS, -1)
    return memories, memories @ read.T, read @ memories @ read.T + np.diag(inputs["noise"])


@few
@given(WIDTHS, SEEDS, st.sampled_from(["layer", "gated"]))
def test_log_evidence_is_the_joint_log_density_of_all_values(widths, seed, kind):
    inputs = draw(widths, seed, kind)
    _, _, seen = joint(inputs, widths, kind)
    expected = sum(
        -0.5 * (y @ np.linalg.solve(seen, y) + np.linalg.slogdet(2 * np.pi * seen)[1])
        for y in inputs["value"].T
    )
    found = float(jnp.sum(compiled(widths, kind)(inputs).log_evidence))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@cache
def compiled_smoother(widths, kind):
    exact = filter_of(widths, kind)
    return jax.jit(lambda inputs: smooth(exact, inputs))


@few
@given(WIDTHS, SEEDS, st.sampled_from(["layer", "gated"]))
def test_smoothing_is_joint_conditioning_at_every_step(widths, seed, kind):
    inputs = draw(widths, seed, kind)
    memories, cross, seen = joint(inputs, widths, kind)
    gain = np.linalg.solve(seen, cross.T).T
    covariance = memories - gain @ cross.T
    mean = (gain @ inputs["value"]).reshape(STEPS, widths[1], widths[0])
    smoothed = compiled_smoother(widths, kind)(inputs)
    close(smoothed.mean[:, 0], mean.transpose(0, 2, 1), 1e-9)
    for t in range(STEPS):
        own = slice(t * widths[1], (t + 1) * widths[1])
        close(smoothed.covariance[t, 0], covariance[own, own], 1e-9)


# -- parts of a filter agree ---------------------------------------------------------------------


@cache
def compiled_forecast(widths, kind):
    exact = filter_of(widths, kind)
    return jax.jit(lambda belief, inputs: exact.forecast(belief, inputs))


@few
@given(WIDTHS, SEEDS)
def test_a_forecast_is_filtering_without_observations(widths, seed):
    inputs = draw(widths, seed)
    inputs["noise"][2:] = 1e14
    filtered = compiled(widths)(inputs)
    known = jax.tree.map(lambda leaf: leaf[1], filtered.beliefs)
    later = {name: array[2:] for name, array in inputs.items()}
    told, read = compiled_forecast(widths, "layer")(known, later)
    close(told.mean, filtered.beliefs.mean[2:], 1e-9)
    close(told.covariance, filtered.beliefs.covariance[2:], 1e-9)
    close(read.variance, filtered.output_variances[2:], 1e-9)


@few
@given(WIDTHS, SEEDS, st.sampled_from(["layer", "increments"]))
def test_factor_form_is_covariance_form(widths, seed, kind):
    inputs = draw(widths, seed, kind)
    plain = compiled(widths, kind)(inputs)
    factor = compiled(widths, kind, form="factor")(inputs)
    close(factor.means, plain.means)
    close(factor.covariances, plain.covariances)
    np.testing.assert_allclose(factor.log_evidence, plain.log_evidence, rtol=1e-9, atol=1e-9)


# -- units ---------------------------------------------------------------------------------------


@few
@given(WIDTHS, SEEDS, st.floats(-100, 100), st.sampled_from(["layer", "increments"]))
def test_means_scale_with_the_values_and_covariances_do_not(widths, seed, unit, kind):
    run, inputs = compiled(widths, kind), draw(widths, seed, kind)
    one, other = run(inputs), run({**inputs, "value": unit * inputs["value"]})
    np.testing.assert_allclose(other.means, unit * np.asarray(one.means), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(other.covariances, one.covariances)


@few
@given(SEEDS, st.sampled_from(["layer", "increments"]), st.sampled_from([1e-12, 16.0]))
def test_beliefs_carry_the_units_of_the_values(seed, kind, variance):
    """All variances times c² and values times c: means times c, covariances times c²."""
    widths = (3, 2)
    inputs, unit = draw(widths, seed, kind), np.sqrt(variance)
    scaled = {
        **inputs,
        "value": unit * inputs["value"],
        "noise": variance * inputs["noise"],
        "drift": variance * inputs["drift"],
    }
    one = compiled(widths, kind)(inputs)
    other = compiled(widths, kind, prior_variance=variance)(scaled)
    close(other.means, unit * np.asarray(one.means))
    close(other.covariances, variance * np.asarray(one.covariances))
    close(other.output_variances, variance * np.asarray(one.output_variances))


@few
@given(WIDTHS, SEEDS, st.floats(0.1, 10))
def test_longer_keys_are_a_smaller_memory(widths, seed, unit):
    """Keys times c, prior and drift over c²: what is read at a key is the same."""
    inputs = draw(widths, seed, "static")
    scaled = {**inputs, "key": unit * inputs["key"], "noise": unit**2 * inputs["noise"]}
    scaled["value"] = unit * inputs["value"]
    one, other = compiled(widths, "static")(inputs), compiled(widths, "static")(scaled)
    close(other.means, np.asarray(one.means))
    close(other.covariances, np.asarray(one.covariances))


# -- reductions ----------------------------------------------------------------------------------


@few
@given(WIDTHS, SEEDS, st.sampled_from([0.5, 1.0, 3.0]))
def test_a_reset_to_the_predicted_covariance_is_exact_on_the_first_step(widths, seed, variance):
    """Before anything drifts the predicted covariance is the prior's."""
    inputs = draw(widths, seed, "static")
    exact = compiled(widths, "static", variance)(inputs)
    reset = compiled(widths, "static", variance, policy=Reset(variance))(inputs)
    close(reset.means[0], exact.means[0])
    close(reset.covariances[0], exact.covariances[0])
    assert not np.allclose(reset.covariances[-1], exact.covariances[-1], rtol=1e-6)


@few
@given(WIDTHS, SEEDS)
def test_delta_product_is_the_delta_rule_on_its_observations_in_turn(widths, seed):
    inputs = draw(widths, seed, "pairs")
    pairs = compiled(widths, "pairs", policy=Reset(1.0))(inputs)
    mean = np.zeros(widths)
    for t in range(STEPS):
        for key, value, noise in zip(
            *(inputs[n][t] for n in ("key", "value", "noise")), strict=True
        ):
            mean = mean + np.outer(value - mean @ key, key) / (key @ key + noise)
        close(pairs.means[t], mean)


@few
@given(WIDTHS, SEEDS)
def test_delta_product_whose_second_observation_says_nothing_is_the_delta_rule(widths, seed):
    inputs = draw(widths, seed, "pairs")
    inputs["key"][:, 1] = 0
    first = {n: a[:, 0] if n != "query" else a for n, a in inputs.items()}
    pairs = compiled(widths, "pairs", policy=Reset(1.0))(inputs)
    close(pairs.means, compiled(widths, "static", policy=Reset(1.0))(first).means)


@few
@given(WIDTHS, SEEDS)
def test_observations_of_one_step_are_absorbed_as_if_in_turn(widths, seed):
    inputs = draw(widths, seed, "pairs")
    pairs = compiled(widths, "pairs")(inputs)
    flat = {n: a.reshape(2 * STEPS, *a.shape[2:]) for n, a in inputs.items() if n != "query"}
    flat["query"] = np.repeat(inputs["query"], 2, axis=0)
    turns = compiled(widths, "static")(flat)
    close(pairs.means, np.asarray(turns.means)[1::2])
    close(pairs.covariances, np.asarray(turns.covariances)[1::2])
    close(pairs.log_evidence, np.asarray(turns.log_evidence).reshape(STEPS, 2).sum(axis=1), 1e-9)
