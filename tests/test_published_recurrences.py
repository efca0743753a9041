"""Every recurrence of the catalogue is the published one.

Means, outputs and, where it has one, the covariance are compared with loops written out in the
papers' own parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_filters import NAMES, by_name
from jla.ops import linear_attention

from design_models.associative_regression import associative_regression
from design_models.catalogue import CATALOGUE, recurrence
from design_models.errors import ModelError
from design_models.policy import Diagonal, Exact, Forget, Isotropic, Policy, Reset
from inference.derivation import draft

STEPS = 12
WIDTHS = [(3, 4)]
SEEDS = [0, 1, 2]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@dataclass
class Published:
    """Inputs of the design model, and what the published recurrence makes of its own parameters.

    `means` is (time, value, key); `covariances`, of the rows stacked, (time, value*key, value*key).
    """

    inputs: dict[str, np.ndarray]
    means: np.ndarray
    covariances: np.ndarray | None = None


def tokens(rng: np.random.Generator, value_width: int, key_width: int, *, unit: bool = False):
    """Draw keys, values and queries; unit-norm keys where the paper normalises them."""
    key = rng.normal(size=(STEPS, key_width)) / np.sqrt(key_width)
    if unit:
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
    query = rng.normal(size=(STEPS, key_width)) / np.sqrt(key_width)
    return key, rng.normal(size=(STEPS, value_width)), query


def any_uncertainty(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Signal and noise for design model B; the published means depend on neither."""
    return {"drift": rng.uniform(0.05, 0.3, STEPS), "noise": rng.uniform(0.1, 0.6, STEPS)}


def rows_apart(covariances: np.ndarray, value_width: int) -> np.ndarray:
    """Covariance of all rows stacked, given the one that they share."""
    return np.stack([np.kron(np.eye(value_width), shared) for shared in covariances])


# Additive writes: Katharopoulos et al. without the normaliser; Sun et al.; Yang et al. (2023), a
# gate per key, state (key, value); Dao & Gu, scalar A, h of shape (head dimension, state).


def linear_attention_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    state, means = np.zeros((key_width, value_width)), []
    for k, v in zip(key, value, strict=True):
        state = state + np.outer(k, v)
        means.append(state.T)
    inputs = {"key": key, "value": value, "query": query, **any_uncertainty(rng)}
    return Published(inputs, np.stack(means))


def retnet_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    head = rng.integers(8)
    gamma = 1 - 2.0 ** (-5 - head)
    state, means = np.zeros((key_width, value_width)), []
    for k, v in zip(key, value, strict=True):
        state = gamma * state + np.outer(k, v)
        means.append(state.T)
    decay = np.full(STEPS, gamma)
    inputs = {"key": key, "value": value, "query": query, "decay": decay, **any_uncertainty(rng)}
    return Published(inputs, np.stack(means))


def gla_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    gate = 1 / (1 + np.exp(-rng.normal(size=(STEPS, key_width))))
    alpha = gate ** (1 / 16)
    state, means = np.zeros((key_width, value_width)), []
    for t in range(STEPS):
        state = np.diag(alpha[t]) @ state + np.outer(key[t], value[t])
        means.append(state.T)
    inputs = {"key": key, "value": value, "query": query, "decay": alpha, **any_uncertainty(rng)}
    return Published(inputs, np.stack(means))


def mamba2_loop(rng, value_width, key_width) -> Published:
    b, x, c = tokens(rng, value_width, key_width)
    rate = rng.uniform(1, 16)
    step = np.log1p(np.exp(rng.normal(size=STEPS) - 3))
    state, means = np.zeros((value_width, key_width)), []
    for t in range(STEPS):
        state = np.exp(-step[t] * rate) * state + step[t] * np.outer(x[t], b[t])
        means.append(state)
    inputs = {"key": b, "value": x, "query": c, "step": step, "rate": np.full(STEPS, rate)}
    return Published({**inputs, **any_uncertainty(rng)}, np.stack(means))


# Delta rules: Schlag et al. and Yang et al. (2024); Gated DeltaNet; Kimi Team, state (key, value);
# Siems et al. Keys have unit norm, so β = 1/(1 + r), that is r = (1 − β)/β.


def deltanet_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width, unit=True)
    beta = rng.uniform(0.05, 0.95, STEPS)
    memory, means = np.zeros((value_width, key_width)), []
    for t in range(STEPS):
        memory = memory + beta[t] * np.outer(value[t] - memory @ key[t], key[t])
        means.append(memory)
    inputs = {"key": key, "value": value, "query": query, "noise": (1 - beta) / beta}
    return Published(inputs, np.stack(means))


def gated_deltanet_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width, unit=True)
    beta, alpha = rng.uniform(0.05, 0.95, STEPS), rng.uniform(0.5, 1, STEPS)
    memory, means = np.zeros((value_width, key_width)), []
    for t in range(STEPS):
        erase = np.eye(key_width) - beta[t] * np.outer(key[t], key[t])
        memory = memory @ (alpha[t] * erase) + beta[t] * np.outer(value[t], key[t])
        means.append(memory)
    inputs = {"key": key, "value": value, "query": query, "decay": alpha}
    return Published({**inputs, "noise": (1 - beta) / beta}, np.stack(means))


def kda_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width, unit=True)
    beta, alpha = rng.uniform(0.05, 0.95, STEPS), rng.uniform(0.5, 1, (STEPS, key_width))
    state, means = np.zeros((key_width, value_width)), []
    for t in range(STEPS):
        erase = np.eye(key_width) - beta[t] * np.outer(key[t], key[t])
        state = erase @ np.diag(alpha[t]) @ state + beta[t] * np.outer(key[t], value[t])
        means.append(state.T)
    inputs = {"key": key, "value": value, "query": query, "decay": alpha}
    return Published({**inputs, "noise": (1 - beta) / beta}, np.stack(means))


def deltaproduct_loop(rng, value_width, key_width) -> Published:
    pairs = [tokens(rng, value_width, key_width, unit=True) for _ in range(2)]
    beta = rng.uniform(0.05, 0.95, (STEPS, 2))
    memory, means = np.zeros((value_width, key_width)), []
    for t in range(STEPS):
        for micro_step, (key, value, _) in enumerate(pairs):
            error = value[t] - memory @ key[t]
            memory = memory + beta[t, micro_step] * np.outer(error, key[t])
        means.append(memory)
    inputs = {
        "key": np.stack([key for key, _, _ in pairs], axis=1),
        "value": np.stack([value for _, value, _ in pairs], axis=1),
        "query": pairs[0][2],
        "noise": (1 - beta) / beta,
    }
    return Published(inputs, np.stack(means))


# Longhorn: Liu et al., their diagonal approximation, Δ = β/(1 + β kᵀk) per value channel.


def longhorn_loop(rng, value_width, key_width) -> Published:
    key, x, query = tokens(rng, value_width, key_width)
    beta = 1 / (1 + np.exp(-rng.normal(size=(STEPS, value_width))))
    state, means = np.zeros((value_width, key_width)), []
    for t in range(STEPS):
        step = beta[t] / (1 + beta[t] * (key[t] @ key[t]))
        kept = 1 - np.outer(step, key[t] ** 2)
        state = kept * state + np.outer(step * x[t], key[t])
        means.append(state)
    inputs = {"key": key, "value": x, "query": query, "noise": 1 / beta}
    return Published(inputs, np.stack(means))


# MesaNet: von Oswald et al., G and H fade by γ, and the read-out solves against G + Λ.


def mesanet_loop(rng, value_width, key_width, ridge=1.0) -> Published:
    key, value, query = tokens(rng, value_width, key_width, unit=True)
    beta, gamma = rng.uniform(0.05, 0.95, STEPS), rng.uniform(0.8, 1, STEPS)
    ridge = np.diag(np.broadcast_to(ridge, key_width))
    g, h = np.zeros((key_width, key_width)), np.zeros((value_width, key_width))
    means, covariances = [], []
    for t in range(STEPS):
        g = gamma[t] * g + beta[t] * np.outer(key[t], key[t])
        h = gamma[t] * h + beta[t] * np.outer(value[t], key[t])
        means.append(np.linalg.solve(g + ridge, h.T).T)
        covariances.append(np.linalg.inv(g + ridge))
    inputs = {"key": key, "value": value, "query": query, "noise": 1 / beta, "forget": gamma}
    return Published(inputs, np.stack(means), rows_apart(np.stack(covariances), value_width))


# Kalman Linear Attention: Shaj et al., entry by entry in information form; a = exp(−Δ|a|), and the
# process noise of an Ornstein-Uhlenbeck process over the same step.


def kalman_linear_attention_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    variance = rng.uniform(0.1, 2, (STEPS, value_width))
    speed, step = rng.uniform(0.5, 2, (2, value_width, key_width))
    diffusion = rng.uniform(0.05, 0.5, (value_width, key_width))
    a = np.exp(-step * speed)
    q = diffusion / (2 * speed) * -np.expm1(-2 * speed * step)
    precision, information = np.ones((value_width, key_width)), np.zeros((value_width, key_width))
    means, covariances = [], []
    for t in range(STEPS):
        for i in range(value_width):
            for j in range(key_width):
                spread = a[i, j] ** 2 + q[i, j] * precision[i, j]
                information[i, j] = (
                    a[i, j] / spread * information[i, j] + value[t, i] * key[t, j] / variance[t, i]
                )
                precision[i, j] = precision[i, j] / spread + key[t, j] ** 2 / variance[t, i]
        means.append(information / precision)
        covariances.append(np.diag(1 / precision.ravel()))
    inputs = {"key": key, "value": value, "query": query, "noise": variance}
    constant = {"decay": np.stack([a] * STEPS), "drift": np.stack([q] * STEPS)}
    return Published({**inputs, **constant}, np.stack(means), np.stack(covariances))


# Kalman Delta Networks: Bui, Huang & Ying, with the information scale of the shipped layers, K.


def kalman_delta_isotropic_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    alpha = rng.uniform(0.5, 1, (STEPS, key_width))
    omega, r = rng.uniform(0.05, 1, (2, STEPS))
    state, precision = np.zeros((key_width, value_width)), 1.0
    means, covariances = [], []
    for t in range(STEPS):
        predicted = np.mean(alpha[t] ** 2) / precision + omega[t]
        norm = key[t] @ key[t]
        beta = predicted / (r[t] + predicted * norm)
        precision = 1 / predicted + key_width * norm / (key_width * r[t])
        state = alpha[t][:, None] * state
        state = state + np.outer(beta * key[t], value[t] - key[t] @ state)
        means.append(state.T)
        covariances.append(np.eye(value_width * key_width) / precision)
    inputs = {"key": key, "value": value, "query": query}
    inputs |= {"decay": alpha, "drift": omega, "noise": r}
    return Published(inputs, np.stack(means), np.stack(covariances))


def kalman_delta_diagonal_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    alpha = rng.uniform(0.5, 1, (STEPS, key_width))
    omega, r = rng.uniform(0.05, 1, (STEPS, key_width)), rng.uniform(0.05, 1, STEPS)
    state, uncertainty = np.zeros((key_width, value_width)), np.ones(key_width)
    means, covariances = [], []
    for t in range(STEPS):
        predicted = alpha[t] ** 2 * uncertainty + omega[t]
        gain = predicted * key[t] / (r[t] + np.sum(predicted * key[t] ** 2))
        uncertainty = predicted / (1 + key_width * key[t] ** 2 / r[t] * predicted)
        state = alpha[t][:, None] * state
        state = state + np.outer(gain, value[t] - key[t] @ state)
        means.append(state.T)
        covariances.append(np.diag(uncertainty))
    inputs = {"key": key, "value": value, "query": query}
    inputs |= {"decay": alpha, "drift": omega, "noise": r}
    return Published(inputs, np.stack(means), rows_apart(np.stack(covariances), value_width))


# The exact filters: ridge regression on the whole past, and the textbook information filter.


def bayesian_static_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    r = rng.uniform(0.1, 0.6, STEPS)
    means, covariances = [], []
    for t in range(1, STEPS + 1):
        weighted = key[:t] / r[:t, None]
        covariance = np.linalg.inv(np.eye(key_width) + weighted.T @ key[:t])
        means.append(value[:t].T @ weighted @ covariance)
        covariances.append(covariance)
    inputs = {"key": key, "value": value, "query": query, "noise": r}
    return Published(inputs, np.stack(means), rows_apart(np.stack(covariances), value_width))


def bayesian_layer_loop(rng, value_width, key_width) -> Published:
    key, value, query = tokens(rng, value_width, key_width)
    a, q = rng.uniform(0.7, 0.99, STEPS), rng.uniform(0.05, 0.3, STEPS)
    r = rng.uniform(0.1, 0.6, STEPS)
    precision, information = np.eye(key_width), np.zeros((value_width, key_width))
    means, covariances = [], []
    for t in range(STEPS):
        mean = a[t] * np.linalg.solve(precision, information.T).T
        precision = np.linalg.inv(a[t] ** 2 * np.linalg.inv(precision) + q[t] * np.eye(key_width))
        information = mean @ precision + np.outer(value[t], key[t]) / r[t]
        precision = precision + np.outer(key[t], key[t]) / r[t]
        means.append(np.linalg.solve(precision, information.T).T)
        covariances.append(np.linalg.inv(precision))
    inputs = {"key": key, "value": value, "query": query, "decay": a, "drift": q, "noise": r}
    return Published(inputs, np.stack(means), rows_apart(np.stack(covariances), value_width))


LOOPS: dict[str, Callable[..., Published]] = {
    "linear_attention": linear_attention_loop,
    "retnet": retnet_loop,
    "gla": gla_loop,
    "mamba2": mamba2_loop,
    "deltanet": deltanet_loop,
    "gated_deltanet": gated_deltanet_loop,
    "kda": kda_loop,
    "deltaproduct": deltaproduct_loop,
    "longhorn": longhorn_loop,
    "mesanet": mesanet_loop,
    "kalman_linear_attention": kalman_linear_attention_loop,
    "kalman_delta_isotropic": kalman_delta_isotropic_loop,
    "kalman_delta_diagonal": kalman_delta_diagonal_loop,
    "bayesian_static": bayesian_static_loop,
    "bayesian_layer": bayesian_layer_loop,
}


def as_jax(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in inputs.items()}


@cache
def derived(name: str, value_width: int, key_width: int):
    inputs = LOOPS[name](np.random.default_rng(0), value_width, key_width).inputs
    return draft(CATALOGUE[name].model(value_width, key_width), as_jax(inputs))


@cache
def compiled(name: str, policy: Policy, value_width: int, key_width: int):
    """The filter under a policy, compiled once for all seeds."""
    exact = derived(name, value_width, key_width)
    return jax.jit(lambda inputs: exact.run(inputs, policy=policy))


def run(name: str, published: Published, policy: Policy | None = None):
    policy = CATALOGUE[name].policy if policy is None else policy
    _, value_width, key_width = published.means.shape
    return compiled(name, policy, value_width, key_width)(as_jax(published.inputs))


def covariances_of(filtered, value_width: int, key_width: int) -> np.ndarray:
    """Covariance of all rows stacked, whether or not the filter found that they share one."""
    covariances = np.asarray(filtered.covariances)
    if covariances.shape[-1] == value_width * key_width:
        return covariances
    return rows_apart(covariances, value_width)


def outputs_of(means: np.ndarray, query: np.ndarray) -> np.ndarray:
    return np.stack([mean @ x for mean, x in zip(means, query, strict=True)])


def test_every_recurrence_of_the_catalogue_has_its_published_form_here():
    assert set(LOOPS) == set(CATALOGUE)
    assert all(entry.name == name for name, entry in CATALOGUE.items())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@by_name(NAMES)
def test_the_filter_is_the_published_recurrence(name, widths, seed):
    published = LOOPS[name](np.random.default_rng(seed), *widths)
    filtered = run(name, published)
    np.testing.assert_allclose(filtered.means, published.means, rtol=1e-10, atol=1e-10)
    outputs = outputs_of(published.means, published.inputs["query"])
    np.testing.assert_allclose(filtered.outputs, outputs, rtol=1e-10, atol=1e-10)
    if published.covariances is not None:
        covariances = covariances_of(filtered, *widths)
        np.testing.assert_allclose(covariances, published.covariances, rtol=1e-10, atol=1e-10)


@by_name(("deltanet", "gated_deltanet", "kda"))
def test_delta_rule_write_strength_follows_from_noise_for_keys_of_any_norm(name):
    inputs = CATALOGUE[name].model(3, 4).draw_inputs(jax.random.key(5), STEPS)
    filtered = compiled(name, CATALOGUE[name].policy, 3, 4)(inputs)
    memory = np.zeros((3, 4))
    for t in range(STEPS):
        k, v = np.asarray(inputs["key"][t]), np.asarray(inputs["value"][t])
        beta = 1 / (k @ k + float(inputs["noise"][t]))
        memory = memory * np.asarray(inputs.get("decay", np.ones(STEPS))[t])
        memory = memory + beta * np.outer(v - memory @ k, k)
        np.testing.assert_allclose(filtered.means[t], memory, rtol=1e-10, atol=1e-10)


@by_name(("linear_attention", "retnet", "gla", "mamba2"))
def test_additive_writes_are_the_posterior_mean_at_every_noise_level(name):
    published = LOOPS[name](np.random.default_rng(4), 3, 4)
    for noise in (1e-4, 1.0, 1e4):
        published.inputs["noise"] = np.full(STEPS, noise)
        filtered = run(name, published)
        np.testing.assert_allclose(filtered.means, published.means, rtol=1e-10, atol=1e-10)


@by_name(("linear_attention", "retnet", "mamba2"))
def test_noise_decides_how_sure_additive_writes_leave_the_memory(name):
    published = LOOPS[name](np.random.default_rng(4), 3, 4)
    filtered = run(name, published)
    u = published.inputs
    elapsed = u.get("step", np.ones(STEPS))
    decay = np.exp(-elapsed * u["rate"]) if name == "mamba2" else u.get("decay", np.ones(STEPS))
    kept_noise = u["noise"] * u["drift"] / (u["drift"] + u["noise"])
    variance = 1.0
    for t in range(STEPS):
        variance = decay[t] ** 2 * variance + elapsed[t] * kept_noise[t]
        covariance = covariances_of(filtered, 3, 4)[t]
        np.testing.assert_allclose(covariance, variance * np.eye(12), rtol=1e-10, atol=1e-10)


def test_mesanet_ridge_is_the_prior_precision_per_key():
    ridge = np.array([0.25, 1.0, 2.0, 4.0])
    published = mesanet_loop(np.random.default_rng(3), 3, 4, ridge)
    model = associative_regression(3, 4, prior_variance=tuple(1 / ridge))
    inputs = as_jax(published.inputs)
    filtered = draft(model, inputs).run(inputs, policy=Forget())
    np.testing.assert_allclose(filtered.means, published.means, rtol=1e-10, atol=1e-10)
    covariances = covariances_of(filtered, 3, 4)
    np.testing.assert_allclose(covariances, published.covariances, rtol=1e-10, atol=1e-10)


def test_diagonal_that_counts_once_keeps_the_diagonal_of_the_posterior_precision():
    exact, reduced = one_step_precisions("kalman_delta_diagonal", Diagonal(count=1.0))
    np.testing.assert_allclose(reduced, np.diag(np.diag(exact)), rtol=1e-10, atol=1e-10)


def test_isotropic_that_counts_once_keeps_the_mean_of_the_posterior_precision():
    equal_decay = {"decay": np.full((STEPS, 4), 0.9)}
    exact, reduced = one_step_precisions("kalman_delta_isotropic", Isotropic(1.0), **equal_decay)
    kept = np.mean(np.diag(exact)) * np.eye(12)
    np.testing.assert_allclose(reduced, kept, rtol=1e-10, atol=1e-10)


def one_step_precisions(name: str, policy, **changed) -> tuple[np.ndarray, np.ndarray]:
    """Posterior precision after one step, exact and reduced, both from the same prior."""
    published = LOOPS[name](np.random.default_rng(6), 3, 4)
    published.inputs |= changed
    both = [run(name, published, each) for each in (Exact(), policy)]
    exact, reduced = (np.linalg.inv(covariances_of(filtered, 3, 4)[0]) for filtered in both)
    return exact, reduced


# A second oracle: jax-linear-attention's token-by-token reference, in float32. Its layout is
# (batch, time, head, width), decays are logarithms, queries are scaled by K^-½, states are (K, V).

PEER_KINDS = {
    "linear_attention": "simple_gla",
    "retnet": "simple_gla",
    "gla": "gla",
    "mamba2": "simple_gla",
    "deltanet": "deltanet",
    "gated_deltanet": "gated_deltanet",
    "kda": "kda",
    "deltaproduct": "gated_deltaproduct",
}


def peer_arguments(name: str, u: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    arguments = {"q": u["query"], "k": u["key"], "v": u["value"]}
    if name == "mamba2":
        arguments |= {"v": u["step"][:, None] * u["value"], "g": -u["step"] * u["rate"]}
    elif name != "deltanet":
        arguments["g"] = np.log(u.get("decay", np.ones(STEPS)))
    if CATALOGUE[name].policy == Reset(1.0):
        arguments["beta"] = 1 / (1 + u["noise"])
    if name == "deltaproduct":
        for several in ("k", "v", "beta"):
            array = arguments[several]
            arguments[several] = array.reshape(2 * STEPS, *array.shape[2:])
    one_head = {key: jnp.asarray(array)[None, :, None] for key, array in arguments.items()}
    return {key: array.astype(jnp.float32) for key, array in one_head.items()}


@by_name(tuple(PEER_KINDS))
def test_the_filter_agrees_with_jax_linear_attention(name):
    published = LOOPS[name](np.random.default_rng(7), 3, 4)
    filtered = run(name, published)
    arguments = peer_arguments(name, published.inputs)
    if name == "deltaproduct":
        arguments["num_householder"] = 2
    outputs, state = linear_attention(
        PEER_KINDS[name], **arguments, impl="reference", output_final_state=True
    )
    np.testing.assert_allclose(outputs[0, :, 0], filtered.outputs * 4**-0.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state[0, 0].T, filtered.means[-1], rtol=1e-5, atol=1e-5)


@by_name(NAMES)
def test_example_inputs_of_every_recurrence_run_at_any_width(name):
    for widths in ((1, 1), (2, 3)):
        inputs = CATALOGUE[name].model(*widths).draw_inputs(jax.random.key(0), 3)
        assert all(np.all(np.isfinite(array)) for array in inputs.values())
        assert all(len(array) == 3 for array in inputs.values())


def test_an_unknown_recurrence_is_refused_with_the_closest_names():
    with pytest.raises(ModelError, match="did you mean gated_deltanet"):
        recurrence("Gated-DeltaNets")
    with pytest.raises(ModelError, match="known: linear_attention"):
        recurrence("softmax")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: associative_regression(0, 2),
        lambda: associative_regression(2, 2, observations=0),
        lambda: associative_regression(2, 2, prior_variance=-1.0),
        lambda: associative_regression(2, 2, prior_variance=(1.0, 1.0, 1.0)),
        lambda: CATALOGUE["gla"].model(2, 0),
        lambda: CATALOGUE["longhorn"].model(0, 2),
        lambda: Reset(0.0),
        lambda: Diagonal(-1.0),
        lambda: Isotropic(0.0),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ModelError, match=r"must be|needs"):
        wrong()
