"""What a derived filter is said to be: its partition, kind, equations, and kin in the catalogue.

Every coefficient that is named is evaluated: what the name says must be what the filter uses.
"""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from catalogue_filters import NAMES, catalogue_filter

from design_models import CATALOGUE, DesignModel
from design_models.example_inputs import DEFAULTS
from inference.derivation import draft
from inference.equations import equations
from inference.exact_filter import ExactFilter
from inference.kinship import find_kin

V, K = 3, 2
pytestmark = pytest.mark.xdist_group("kin")  # kinship derives the whole catalogue once a process


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# -- models outside the catalogue ----------------------------------------------------------------


def normal_prior(scale=1.0, shape=(V, K)):
    return lambda: numpyro.sample(
        "memory", dist.Normal(jnp.zeros(shape), scale).to_event(len(shape))
    )


def noisy_read(memory, u):
    value = dist.Normal(memory @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
    numpyro.sample("value", value, obs=u["value"])


def drifting(mean, variance):
    return numpyro.sample("moved", dist.Normal(mean, jnp.sqrt(variance)).to_event(mean.ndim))


def drawn(steps, rng, **shapes):
    """Defaults for known names; standard normal arrays of the given shapes for others."""
    names = [name for name in DEFAULTS if name in shapes]
    inputs = {}
    for index, (name, shape) in enumerate(shapes.items()):
        own = jax.random.fold_in(rng, index)
        positive = name in (*names, "step", "rate", "gate") and name not in (
            "key",
            "query",
            "value",
        )
        draw = partial(jax.random.uniform, minval=0.1, maxval=0.9) if positive else None
        inputs[name] = (draw or jax.random.normal)(own, (steps, *shape))
    return inputs


def with_inputs(prior, transition, observe, readout=None, **extra):
    shapes = {"key": (K,), "value": (V,), "query": (K,), "noise": (), **extra}
    return DesignModel(
        prior, transition, observe, readout, inputs=lambda rng, steps: drawn(steps, rng, **shapes)
    )


def rotation():
    def transition(memory, u):
        cosine, sine = jnp.cos(u["angle"]), jnp.sin(u["angle"])
        turn = jnp.array([[cosine, -sine], [sine, cosine]])
        return drifting(memory @ turn.T, u["drift"])

    return with_inputs(normal_prior(), transition, noisy_read, angle=(), drift=())


def given_matrix():
    def transition(memory, u):
        return drifting(memory @ u["mix"], u["drift"])

    return with_inputs(normal_prior(), transition, noisy_read, mix=(K, K), drift=())


def dense_drift():
    def transition(memory, u):
        covariance = jnp.eye(K) + jnp.outer(u["key"], u["key"])
        rows = dist.MultivariateNormal(memory, covariance).to_event(1)
        return numpyro.sample("moved", rows)

    return with_inputs(normal_prior(), transition, noisy_read)


def separate_rows():
    def observe(memory, u):
        value = dist.Normal(memory @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
        numpyro.sample("value", value, obs=u["value"])

    return with_inputs(normal_prior(), lambda memory, u: memory, observe, noise=(V,))


def separate_rows_in_tiny_units():
    unit = 1e-6  # values of this size have variances of 1e-12

    def observe(memory, u):
        scale = unit * jnp.sqrt(u["noise"] * jnp.arange(1, V + 1))
        value = dist.Normal(memory @ u["key"], scale).to_event(1)
        numpyro.sample("value", value, obs=unit * u["value"])

    def transition(memory, u):
        return numpyro.sample("moved", dist.Normal(memory, unit * jnp.sqrt(u["drift"])).to_event(2))

    return with_inputs(normal_prior(unit), transition, observe, drift=())


def two_groups():
    """One memory read by two groups of values, with a noise each."""

    def observe(memory, u):
        for name in ("left", "right"):
            value = dist.Normal(memory @ u[f"{name}_key"], jnp.sqrt(u[f"{name}_noise"])).to_event(1)
            numpyro.sample(name, value, obs=u[name])

    def inputs(rng, steps):
        keys = jax.random.split(rng, 6)
        return {
            "left_key": jax.random.normal(keys[0], (steps, K)),
            "right_key": jax.random.normal(keys[1], (steps, K)),
            "left": jax.random.normal(keys[2], (steps, V)),
            "right": jax.random.normal(keys[3], (steps, V)),
            "left_noise": jax.random.uniform(keys[4], (steps,), minval=0.1),
            "right_noise": jax.random.uniform(keys[5], (steps,), minval=0.1),
        }

    return DesignModel(normal_prior(), lambda memory, u: memory, observe, inputs=inputs)


def local_linear_trend():
    def transition(memory, u):
        moved = jnp.array([memory[0] + memory[1], memory[1]])
        return drifting(moved, jnp.stack([u["drift"], 0.1 * u["drift"]]))

    def observe(memory, u):
        numpyro.sample("value", dist.Normal(memory[0], jnp.sqrt(u["noise"])), obs=u["value"])

    return with_inputs(
        normal_prior(shape=(2,)), transition, observe, lambda memory, u: memory[0],
        value=(), drift=(),
    )  # fmt: skip


def time_varying_gate():
    """Mamba's step size and rate, on a memory that is read noisily."""

    def transition(memory, u):
        return drifting(memory * jnp.exp(-u["step"] * u["rate"]), u["drift"])

    return with_inputs(normal_prior(), transition, noisy_read, step=(), rate=(), drift=())


def unit_keys():
    def observe(memory, u):
        noisy_read(memory, {**u, "key": u["key"] / jnp.linalg.norm(u["key"])})

    return with_inputs(normal_prior(), lambda memory, u: memory * u["decay"], observe, decay=(K,))


def biased():
    def transition(memory, u):
        return drifting(memory + u["push"], u["drift"])

    def observe(memory, u):
        value = dist.Normal(memory @ u["key"] + u["bias"], jnp.sqrt(u["noise"])).to_event(1)
        numpyro.sample("value", value, obs=u["value"])

    return with_inputs(normal_prior(), transition, observe, push=(V, K), bias=(V,), drift=())


def stationary():
    """The drift that keeps the prior's variance; it has no root where the decay exceeds 1."""

    def transition(memory, u):
        return drifting(memory * u["decay"], 1 - u["decay"] ** 2)

    return DesignModel(normal_prior(), transition, noisy_read)


def two_timescales():
    def prior():
        zeros = jnp.zeros((V, K))
        return {
            name: numpyro.sample(name, dist.Normal(zeros, 1.0).to_event(2))
            for name in ("fast", "slow")
        }

    def transition(memory, u):
        return {"fast": memory["fast"] * u["decay"], "slow": memory["slow"]}

    def observe(memory, u):
        noisy_read(memory["fast"] + memory["slow"], u)

    def readout(memory, u):
        return (memory["fast"] + memory["slow"]) @ u["query"]

    return with_inputs(prior, transition, observe, readout, decay=())


def tied_rows():
    """Rows that drift together."""

    def transition(memory, u):
        common = numpyro.sample(
            "common", dist.Normal(jnp.zeros(K), jnp.sqrt(u["drift"])).to_event(1)
        )
        return memory + common

    return with_inputs(normal_prior(), transition, noisy_read, drift=())


def evidence_that_sees_memory():
    def transition(memory, u):
        write = drifting(jnp.zeros((V, K)), u["drift"])
        seen = dist.Normal(0.5 * memory + write, jnp.sqrt(u["noise"])).to_event(2)
        numpyro.sample("evidence", seen, obs=jnp.outer(u["value"], u["key"]))
        return memory + write

    return with_inputs(normal_prior(), transition, lambda memory, u: None, drift=())


def evidence_and_observation():
    def transition(memory, u):
        write = drifting(jnp.zeros((V, K)), u["drift"])
        seen = dist.Normal(write, jnp.sqrt(u["evidence_noise"])).to_event(2)
        numpyro.sample("evidence", seen, obs=u["evidence"])
        return memory * u["decay"] + write

    def inputs(rng, steps):
        shapes = {"key": (K,), "value": (V,), "query": (K,), "noise": (), "drift": (), "decay": ()}
        own = drawn(steps, rng, evidence=(V, K), **shapes)
        return {**own, "evidence_noise": 0.5 + own["noise"]}

    return DesignModel(normal_prior(), transition, noisy_read, inputs=inputs)


def correlated_prior():
    def prior():
        rows = dist.MultivariateNormal(jnp.zeros((V, K)), jnp.eye(K) + 0.5).to_event(1)
        return numpyro.sample("memory", rows)

    return with_inputs(prior, lambda memory, u: memory, noisy_read)


OUTSIDE = {
    #                    kind, (blocks, rows, width), transition, drift, observations, shifted
    rotation: ("shared rows", (1, V, K), "dense", "scalar", 1, False),
    given_matrix: ("shared rows", (1, V, K), "dense", "scalar", 1, False),
    dense_drift: ("shared rows", (1, V, K), "identity", "dense", 1, False),
    separate_rows: ("separate rows", (V, 1, K), "identity", "zero", 1, False),
    separate_rows_in_tiny_units: ("separate rows", (V, 1, K), "identity", "scalar", 1, False),
    two_groups: ("shared rows", (1, V, K), "identity", "zero", 2, False),
    local_linear_trend: ("shared rows", (1, 1, 2), "dense", "diagonal", 1, False),
    time_varying_gate: ("shared rows", (1, V, K), "scalar", "scalar", 1, False),
    unit_keys: ("shared rows", (1, V, K), "diagonal", "zero", 1, False),
    biased: ("shared rows", (1, V, K), "identity", "scalar", 1, True),
    stationary: ("shared rows", (1, V, K), "scalar", "scalar", 1, False),
    two_timescales: ("blocks", (1, V, 2 * K), "diagonal", "zero", 1, False),
    tied_rows: ("dense", (1, 1, V * K), "identity", "dense", V, False),
    evidence_that_sees_memory: ("scalar", (1, V * K, 1), "identity", "scalar", 0, False),
    evidence_and_observation: ("shared rows", (1, V, K), "scalar", "scalar", 1, False),
    correlated_prior: ("shared rows", (1, V, K), "identity", "zero", 1, False),
}

CATALOGUED = {
    #                      kind, (blocks, rows, width), transition, drift, evidence, observations
    "linear_attention": ("scalar", (1, V * K, 1), "identity", "scalar", 1, 0),
    "retnet": ("scalar", (1, V * K, 1), "scalar", "scalar", 1, 0),
    "gla": ("diagonal", (K, V, 1), "scalar", "scalar", 1, 0),
    "mamba2": ("scalar", (1, V * K, 1), "scalar", "scalar", 1, 0),
    "deltanet": ("shared rows", (1, V, K), "identity", "zero", 0, 1),
    "gated_deltanet": ("shared rows", (1, V, K), "scalar", "zero", 0, 1),
    "kda": ("shared rows", (1, V, K), "diagonal", "zero", 0, 1),
    "deltaproduct": ("shared rows", (1, V, K), "identity", "zero", 0, 2),
    "longhorn": ("diagonal", (V * K, 1, 1), "identity", "zero", 0, 1),
    "mesanet": ("shared rows", (1, V, K), "identity", "zero", 0, 1),
    "kalman_linear_attention": ("diagonal", (V * K, 1, 1), "scalar", "scalar", 0, 1),
    "kalman_delta_isotropic": ("shared rows", (1, V, K), "diagonal", "scalar", 0, 1),
    "kalman_delta_diagonal": ("shared rows", (1, V, K), "diagonal", "diagonal", 0, 1),
    "bayesian_static": ("shared rows", (1, V, K), "identity", "zero", 0, 1),
    "bayesian_layer": ("shared rows", (1, V, K), "scalar", "scalar", 0, 1),
}


@cache
def outside(make) -> ExactFilter:
    return draft(make())


def name_of(make) -> str:
    return make.__name__


# -- partition and kind --------------------------------------------------------------------------


@pytest.mark.parametrize("make", OUTSIDE, ids=name_of)
def test_structure_outside_the_catalogue(make):
    exact = outside(make)
    kind, cut, transition, drift, observations, shifted = OUTSIDE[make]
    found = exact.structure
    assert exact.partition.states.shape == cut
    assert (found.kind, found.transition, found.drift) == (kind, transition, drift)
    assert (found.observations, found.shifted) == (observations, shifted)


@pytest.mark.parametrize("name", NAMES)
def test_structure_of_the_catalogue(name):
    exact = catalogue_filter(name)
    kind, cut, transition, drift, evidence, observations = CATALOGUED[name]
    found = exact.structure
    assert exact.partition.states.shape == cut
    assert (found.kind, found.transition, found.drift) == (kind, transition, drift)
    assert (found.evidence, found.observations, found.shifted) == (evidence, observations, False)


def test_the_words_give_rows_and_widths():
    assert catalogue_filter("bayesian_layer").structure.words == (
        "The 3 rows of the memory share one 2×2 covariance."
    )
    assert outside(separate_rows).structure.words == (
        "The 3 rows are independent, each with a 2×2 covariance of its own."
    )
    assert catalogue_filter("linear_attention").structure.words == (
        "All 6 entries of the memory share one variance."
    )
    assert (
        "2 different variances, each shared by 3 entries" in catalogue_filter("gla").structure.words
    )
    assert outside(tied_rows).structure.words == (
        "All 6 entries are tied together: one 6×6 covariance."
    )
    assert outside(two_timescales).structure.words == (
        "The memory falls into 3 independent groups of 4 entries with 1 different covariances."
    )


def test_structure_does_not_depend_on_zeros_and_ones_in_the_examples():
    """Keys along one axis and a decay of 1 are values, not assumptions."""
    model = CATALOGUE["bayesian_layer"].model(V, K)
    special = {
        **model.draw_inputs(jax.random.key(0), 3),
        "key": jnp.eye(K)[jnp.zeros(3, int)],
        "decay": jnp.ones(3),
    }
    assert draft(model, special).structure == catalogue_filter("bayesian_layer").structure


def test_rows_that_differ_in_tiny_units_are_not_shared():
    exact = outside(separate_rows_in_tiny_units)
    inputs = exact.model.draw_inputs(jax.random.key(1), 1)
    unit, u = 1e-6, {name: np.asarray(array[0]) for name, array in inputs.items()}
    predicted = unit**2 * (1 + u["drift"]) * np.eye(K)
    for row in range(V):
        noise = unit**2 * u["noise"] * (row + 1)
        gain = predicted @ u["key"] / (u["key"] @ predicted @ u["key"] + noise)
        posterior = predicted - np.outer(gain, u["key"] @ predicted)
        found = exact.run(inputs).beliefs.covariance[0, row]
        np.testing.assert_allclose(found / unit**2, posterior / unit**2, rtol=1e-9, atol=1e-12)


# -- equations -----------------------------------------------------------------------------------

NAMED = {
    rotation: {"Q": "drift · I", "k": "key", "r": "noise"},
    given_matrix: {"F": "mixᵀ", "Q": "drift · I", "k": "key", "r": "noise"},
    dense_drift: {"k": "key", "r": "noise"},
    separate_rows: {"H": "key", "R": "noise, row by row"},
    local_linear_trend: {"r": "noise"},
    time_varying_gate: {"F": "exp(−rate·step) · I", "Q": "drift · I", "k": "key"},
    unit_keys: {"F": "decay (diagonal)", "k": "key/‖key‖", "r": "noise"},
    biased: {"f": "push", "b": "bias", "Q": "drift · I", "k": "key", "r": "noise"},
    stationary: {"F": "decay · I", "Q": "(1 − decay²) · I", "k": "key", "r": "noise"},
    tied_rows: {},
    evidence_that_sees_memory: {"q": "drift", "h": "0.5", "c": "drift"},
    evidence_and_observation: {
        "F": "decay · I", "Q": "drift · I", "H": "key", "R": "noise", "H_z": "0", "C": "drift · I",
    },
    "linear_attention": {"q": "drift", "c": "drift", "r": "drift + noise"},
    "retnet": {"a": "decay", "q": "drift", "c": "drift"},
    "gla": {"a": "decay of the entry's column", "q": "drift", "c": "drift"},
    "mamba2": {"a": "exp(−rate·step)", "q": "drift·step", "c": "drift"},
    "bayesian_static": {"k": "key", "r": "noise"},
    "bayesian_layer": {"F": "decay · I", "Q": "drift · I", "k": "key", "r": "noise"},
    "kda": {"F": "decay (diagonal)", "k": "key", "r": "noise"},
    "kalman_delta_diagonal": {"F": "decay (diagonal)", "Q": "drift (diagonal)"},
    "kalman_linear_attention": {
        "a": "decay", "q": "drift",
        "h": "key of the entry's column", "r": "noise of the entry's row",
    },
    "longhorn": {"h": "key of the entry's column"},
}  # fmt: skip


def named_coefficients(exact: ExactFilter) -> dict[str, str]:
    matches = (re.match(r"  with (\S+) = (.*)", line) for line in equations(exact))
    return {match[1]: match[2] for match in matches if match}


def evaluate(expression: str, u: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a printed expression, as a reader would take it."""
    body = expression.removesuffix(" · I").removesuffix(" (diagonal)")
    diagonal = expression.endswith((" · I", " (diagonal)"))
    python = re.sub(r"‖(\w+)‖", r"norm(\1)", body)
    python = re.sub(r"(\w+)ᵀ", r"\1.T", python)
    python = python.replace("·", "*").replace("−", "-").replace("²", "**2")
    python = re.sub(r"√(\w+)", r"sqrt(\1)", python)
    value = eval(python, {"exp": np.exp, "sqrt": np.sqrt, "norm": np.linalg.norm, **u})
    if diagonal:
        return value * np.eye(K)
    return np.reshape(value, (K, K)) if np.size(value) == K * K else np.asarray(value)


@pytest.mark.parametrize(
    "case", NAMED, ids=lambda case: case if isinstance(case, str) else name_of(case)
)
def test_equations_name_the_coefficients(case):
    exact = catalogue_filter(case) if isinstance(case, str) else outside(case)
    found = named_coefficients(exact)
    assert {symbol: found.get(symbol) for symbol in NAMED[case]} == NAMED[case]


WHOLE_ROWS = [c for c in NAMED if not isinstance(c, str) and OUTSIDE[c][0] == "shared rows"] + [
    "bayesian_static", "bayesian_layer", "kda", "kalman_delta_diagonal",
]  # fmt: skip


@pytest.mark.parametrize(
    "case", WHOLE_ROWS, ids=lambda case: case if isinstance(case, str) else name_of(case)
)
def test_named_coefficients_have_the_values_of_the_model(case):
    """Each named coefficient, evaluated at new inputs, is what a plain run of the model shows."""
    exact = catalogue_filter(case) if isinstance(case, str) else outside(case)
    model = exact.model
    u = {n: np.asarray(a[0]) for n, a in model.draw_inputs(jax.random.key(9), 1).items()}
    memory = np.random.default_rng(0).normal(size=jax.tree.leaves(exact.proof.memory)[0].shape)

    def plain(function, memory):
        handler = numpyro.handlers.trace(numpyro.handlers.seed(function, jax.random.key(0)))
        sites = handler.get_trace(jnp.asarray(memory), u).values()
        return [site["fn"] for site in sites if site["type"] == "sample"]

    found = named_coefficients(exact)
    printed = {
        symbol: evaluate(text, u) for symbol, text in found.items() if "function of" not in text
    }
    moved = plain(model.transition, memory)
    read = plain(model.observe, memory)
    if "F" in printed and "C" not in printed:
        shown = moved[0].mean if moved else model.transition(jnp.asarray(memory), u)
        np.testing.assert_allclose(memory @ printed["F"].T, shown, atol=1e-12)
    if "f" in printed:
        np.testing.assert_allclose(memory + printed["f"], moved[0].mean, atol=1e-12)
    if "Q" in printed:
        variance = np.broadcast_to(moved[0].variance, memory.shape)
        np.testing.assert_allclose(np.diag(printed["Q"]), variance[0], atol=1e-12)
    if "k" in printed:
        expected = memory @ printed["k"] + printed.get("b", 0)
        np.testing.assert_allclose(read[0].mean, expected, atol=1e-12)
    if "r" in printed:
        shown = np.ravel(read[0].variance)
        np.testing.assert_allclose(printed["r"] * np.ones(len(shown)), shown, atol=1e-12)


def test_what_is_not_recognised_is_said_to_be_a_function_of_the_inputs():
    found = named_coefficients(outside(rotation))
    assert found["F"].startswith("a function of the inputs; ")
    assert "at the first step" in found["F"]


# -- kinship -------------------------------------------------------------------------------------

SAME = {
    "linear_attention": ("linear_attention",),
    "retnet": ("retnet", "mamba2"),
    "mamba2": ("retnet", "mamba2"),
    "gla": ("gla",),
    "kalman_linear_attention": ("kalman_linear_attention",),
    "bayesian_static": ("bayesian_static",),
    "bayesian_layer": ("bayesian_layer",),
}
NOVEL = (
    rotation, given_matrix, dense_drift, separate_rows, two_groups, biased, two_timescales,
    tied_rows, local_linear_trend, evidence_that_sees_memory, evidence_and_observation,
)  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_an_exact_entry_is_its_own_kin(name):
    assert find_kin(catalogue_filter(name).structure).same == SAME[name]


def test_entries_of_one_design_model_are_named_as_its_reductions():
    assert find_kin(catalogue_filter("bayesian_static").structure).reductions == (
        "deltanet",
        "mesanet",
    )
    kin = find_kin(catalogue_filter("gated_deltanet").structure)
    assert (kin.same, kin.reductions) == ((), ("gated_deltanet",))
    assert kin.general[0] == "bayesian_layer"


@pytest.mark.parametrize("make", NOVEL, ids=name_of)
def test_a_novel_recurrence_is_not_taken_for_one_of_the_catalogue(make):
    assert find_kin(outside(make).structure).same == ()


def test_a_memory_with_a_tied_drift_is_the_bayesian_layer():
    assert find_kin(outside(stationary).structure).same == ("bayesian_layer",)
    assert find_kin(outside(time_varying_gate).structure).same == ("bayesian_layer",)
