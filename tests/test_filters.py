"""The exact filters against joint conditioning, a dense textbook filter, and float64."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_filters import EXACT_NAMES, NAMES, by_name, catalogue_filter

from design_models import CATALOGUE
from inference.claim import claimant
from inference.evaluation import check_steps
from inference.exact_filter import Filtered
from inference.kalman import advance, advance_factor
from inference.linear_gaussian import Belief, FactorBelief, Observation, Observed, Step
from inference.oracles import joint
from inference.oracles.program import Program
from inference.smoothing import smooth

STEPS = 200


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@by_name(EXACT_NAMES)
def test_one_step_agrees_with_joint_conditioning(name):
    exact = catalogue_filter(name)
    inputs = exact.model.draw_inputs(jax.random.key(3), 1)
    _, _, seen = Program(exact.model, inputs).simulate(jax.random.key(4))
    for check in joint.judge(exact.model, claimant(exact), inputs, seen):
        assert check.statistic <= 1e-10, check


@dataclass
class Dense:
    """One step of the stacked rows: x' = F x + w, z = w/scale + e, y = H x' + e'."""

    transition: np.ndarray
    drift: float | np.ndarray
    observation: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # H, R, y
    evidence: tuple[float, float, np.ndarray] | None = None  # scale, r, z


def dense_step(name: str, u: dict[str, np.ndarray], value_width: int) -> Dense:
    """The published assumptions of a catalogue entry, written out over the stacked rows."""
    key, value = u["key"], u["value"]
    rows = np.eye(value_width)
    per_key = np.ones(len(key))
    if name == "mamba2":
        decay, scale = np.exp(-u["step"] * u["rate"]), u["step"]
        drift, noise = u["drift"] * u["step"], u["noise"] / u["step"]
    else:
        decay, scale = u.get("decay", np.array(1.0)), 1.0
        drift, noise = u.get("drift", np.array(0.0)), u["noise"]
    if name in ("linear_attention", "retnet", "gla", "mamba2"):
        seen = np.outer(value, key).ravel() * (u["drift"] + u["noise"]) / u["drift"]
        return Dense(np.kron(rows, np.diag(decay * per_key)), drift, None, (scale, noise, seen))
    if name == "kalman_linear_attention":
        matrix = np.diag(np.tile(key, value_width))
        law = matrix, np.diag(np.repeat(noise, len(key))), np.repeat(value, len(key))
        return Dense(np.diag(decay.ravel()), drift.ravel(), law)
    law = np.kron(rows, key[None]), noise * rows, value
    return Dense(np.kron(rows, np.diag(decay * per_key)), drift, law)


def absorb(mean, covariance, matrix, noise, seen):
    """Condition on seen = matrix · state + noise: (mean, covariance, log density)."""
    spread = matrix @ covariance @ matrix.T + noise
    gain = covariance @ matrix.T @ np.linalg.inv(spread)
    off = seen - matrix @ mean
    log_density = -0.5 * (
        off @ np.linalg.solve(spread, off) + np.linalg.slogdet(2 * np.pi * spread)[1]
    )
    return mean + gain @ off, covariance - gain @ spread @ gain.T, log_density


def dense_filter(steps: list[Dense], size: int):
    """Means, covariances and log evidence of a textbook filter; the write is part of its state."""
    mean, covariance = np.zeros(size), np.eye(size)
    means, covariances, log_evidence = [], [], []
    for step in steps:
        # The state is (memory, write), so that evidence about the write is about the state.
        whole = np.block([[step.transition, np.eye(size)], [np.zeros((size, size)), np.eye(size)]])
        write = np.diag(np.broadcast_to(step.drift, size))
        apart = np.block([[covariance, np.zeros((size, size))], [np.zeros((size, size)), write]])
        both_mean, both = whole @ np.append(mean, np.zeros(size)), whole @ apart @ whole.T
        added = 0.0
        if step.evidence is not None:
            scale, noise, seen = step.evidence
            matrix = np.hstack([np.zeros((size, size)), np.eye(size) / scale])
            both_mean, both, more = absorb(both_mean, both, matrix, noise * np.eye(size), seen)
            added += more
        mean, covariance = both_mean[:size], both[:size, :size]
        if step.observation is not None:
            mean, covariance, more = absorb(mean, covariance, *step.observation)
            added += more
        covariance = (covariance + covariance.T) / 2
        means.append(mean)
        covariances.append(covariance)
        log_evidence.append(added)
    return np.array(means), np.array(covariances), np.array(log_evidence)


@cache
def filtered(name: str) -> tuple[dict[str, jax.Array], Filtered]:
    exact = catalogue_filter(name)
    inputs = exact.model.draw_inputs(jax.random.key(5), STEPS)
    return inputs, exact.run(inputs)


@by_name(EXACT_NAMES)
def test_two_hundred_steps_agree_with_a_dense_filter(name):
    inputs, found = filtered(name)
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    value_width, key_width = found.means.shape[1:]
    dense = [
        dense_step(name, {n: array[t] for n, array in arrays.items()}, value_width)
        for t in range(STEPS)
    ]
    means, covariances, log_evidence = dense_filter(dense, value_width * key_width)
    dense_found = jax.vmap(catalogue_filter(name).dense_covariance)(found.beliefs.covariance)
    np.testing.assert_allclose(found.means.reshape(STEPS, -1), means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dense_found, covariances, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.log_evidence, log_evidence, rtol=1e-9, atol=1e-9)
    read = [np.kron(np.eye(value_width), query[None]) for query in arrays["query"]]
    outputs = [row @ mean for row, mean in zip(read, means, strict=True)]
    variances = [np.diag(r @ p @ r.T) for r, p in zip(read, covariances, strict=True)]
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.output_variances, variances, rtol=1e-9, atol=1e-9)


@by_name(EXACT_NAMES)
def test_factor_form_is_covariance_form(name):
    inputs, plain = filtered(name)
    factor = catalogue_filter(name).run(inputs, form="factor")
    np.testing.assert_allclose(factor.means, plain.means, atol=1e-11)
    np.testing.assert_allclose(factor.covariances, plain.covariances, atol=1e-11)
    np.testing.assert_allclose(factor.log_evidence, plain.log_evidence, atol=1e-9)


WIDTH, WRITES, NOISE, PRIOR_VARIANCE = 16, 10_000, 1e-6, 100.0


def correlated_keys() -> np.ndarray:
    """Unit keys of cosine 0.9 with each other, on average."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=WIDTH)
    common /= np.linalg.norm(common)
    own = rng.normal(size=(WRITES, WIDTH))
    own -= np.outer(own @ common, common)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return np.sqrt(0.9) * common + np.sqrt(0.1) * own


def covariances_in_float32(advance_one, start, covariance_of) -> np.ndarray:
    """Covariances after every hundredth write, each computed from the state in float64."""

    def body(belief, key):
        noise = jnp.full((1, 1, 1), NOISE, jnp.float32)
        given = Observation(key[None, None], jnp.zeros((1, 1, 1), jnp.float32), noise)
        zero = jnp.zeros((1, WIDTH, WIDTH), jnp.float32)
        still = jnp.eye(WIDTH, dtype=jnp.float32)[None]
        step = Step(still, jnp.zeros((1, 1, WIDTH), jnp.float32), zero, None, given)
        seen = Observed(None, jnp.ones((1, 1, 1), jnp.float32))
        return advance_one(belief, step, seen)[0], None

    def hundred(belief, keys):
        belief = jax.lax.scan(body, belief, keys)[0]
        return belief, covariance_of(belief)

    keys = correlated_keys().astype(np.float32).reshape(-1, 100, WIDTH)
    states = np.asarray(jax.jit(lambda keys: jax.lax.scan(hundred, start, keys)[1])(keys))
    assert states.dtype == np.float32
    return states[:, 0].astype(np.float64)


def test_factor_form_keeps_definiteness_in_float32_over_ten_thousand_correlated_writes():
    root = np.float32(np.sqrt(PRIOR_VARIANCE)) * jnp.eye(WIDTH, dtype=jnp.float32)[None]
    start = FactorBelief(jnp.zeros((1, 1, WIDTH), jnp.float32), root)
    factors = covariances_in_float32(advance_factor, start, lambda belief: belief.cholesky)
    assert np.all(np.isfinite(factors))
    keys = correlated_keys().astype(np.float32).astype(np.float64)
    for index, factor in enumerate(factors):
        seen = keys[: 100 * (index + 1)]
        precision = np.eye(WIDTH) / PRIOR_VARIANCE + seen.T @ seen / NOISE
        root = np.linalg.cholesky(precision)
        # Relative to the exact covariance, in every direction: the identity where it is right.
        relative = np.linalg.eigvalsh(root.T @ factor @ factor.T @ root)
        assert relative[0] > 0.99, (index, relative)
        assert relative[-1] < 1.01, (index, relative)


def test_covariance_form_loses_definiteness_in_float32_on_the_same_writes():
    """So the test above can fail."""
    prior = np.float32(PRIOR_VARIANCE) * jnp.eye(WIDTH, dtype=jnp.float32)[None]
    start = Belief(jnp.zeros((1, 1, WIDTH), jnp.float32), prior)
    covariances = covariances_in_float32(advance, start, lambda belief: belief.covariance)
    finite = np.all(np.isfinite(covariances), axis=(1, 2))
    lowest = [np.linalg.eigvalsh((c + c.T) / 2)[0] for c in covariances[finite]]
    assert not finite.all() or min(lowest) < 0


def test_smoothing_agrees_with_filtering_at_the_end():
    exact = catalogue_filter("bayesian_layer")
    inputs = exact.model.draw_inputs(jax.random.key(7), 6)
    smoothed, filtered = smooth(exact, inputs), exact.run(inputs).beliefs
    np.testing.assert_allclose(smoothed.mean[-1], filtered.mean[-1], atol=1e-12)
    early = jnp.trace(smoothed.covariance[0, 0]) < jnp.trace(filtered.covariance[0, 0])
    assert bool(early), "later observations make the first memory surer"


@by_name(NAMES)
def test_coefficients_of_the_catalogue_are_those_of_plain_evaluation(name):
    exact = catalogue_filter(name)
    worst = check_steps(exact.proof, exact.partition, exact.examples, jax.random.key(0))
    assert worst < 1e-9


@by_name(NAMES)
def test_compiled_paths_of_the_catalogue_are_those_of_the_derived_structure(name):
    assert CATALOGUE[name].paths == catalogue_filter(name).structure.paths
