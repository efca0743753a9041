"""Inputs of a sequence at which a proved model makes no sense are refused when it is filtered."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from design_models import DesignModel, ModelError
from inference import ExactFilter, smooth
from inference.derivation import draft

STEPS, V, K = 6, 3, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def prior():
    return numpyro.sample("memory", dist.Normal(jnp.zeros((V, K)), 1.0).to_event(2))


def transition(memory, u):
    return numpyro.sample("moved", dist.Normal(memory * u["decay"], u["drift"]).to_event(2))


def observe(memory, u):
    law = dist.Normal(memory @ u["key"], u["noise"]).to_event(1)
    numpyro.sample("value", law, obs=u["value"])
    several = dist.MultivariateNormal(memory @ u["key"], u["covariance"])
    numpyro.sample("value_twice", several, obs=u["value"])


def readout(memory, u):
    return memory @ u["query"]


def draw(rng, steps):
    rng = np.random.default_rng(3)
    drawn = {
        "key": rng.normal(size=(steps, K)),
        "query": rng.normal(size=(steps, K)),
        "value": rng.normal(size=(steps, V)),
        "decay": rng.uniform(0.5, 1, steps),
        "drift": rng.uniform(0.1, 0.5, steps),
        "noise": rng.uniform(0.1, 0.5, steps),
        "covariance": np.tile(0.5 * np.eye(V), (steps, 1, 1)),
    }
    return {name: jnp.asarray(array) for name, array in drawn.items()}


@cache
def exact() -> ExactFilter:
    return draft(DesignModel(prior, transition, observe, readout, inputs=draw))


def spoiled(name, value, step=4):
    inputs = draw(None, STEPS)
    return {**inputs, name: inputs[name].at[step].set(value)}


SPOILED = {
    "negative scale": ("noise", -0.3, "`observe`, site 'value', step 5: its scale is -0.3"),
    "zero scale": ("drift", 0.0, "`transition`, site 'moved', step 5: its scale is 0; it must be"),
    "infinite scale": ("noise", jnp.inf, "`observe`, site 'value', step 5: its scale is inf"),
    "nan in a mean": ("decay", jnp.nan, "`transition`, site 'moved', step 5: its loc is"),
    "infinite key": ("key", jnp.inf, "`observe`, site 'value', step 5: its loc is nan"),
    "nan observed": ("value", jnp.nan, "`observe`, site 'value', step 5: its observed value is"),
    "nan in a query": ("query", jnp.nan, "`readout`, step 5: it returns nan"),
    "indefinite covariance": (
        "covariance", jnp.diag(jnp.array([1.0, -1.0, 1.0])),
        "`observe`, site 'value_twice', step 5: its covariance_matrix is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_step_without_a_density_is_named(case):
    name, value, words = SPOILED[case]
    with pytest.raises(ModelError) as caught:
        exact().check(spoiled(name, value))
    assert str(caught.value).startswith(words)
    assert "Correct the inputs of that step" in str(caught.value)
    assert __file__ in str(caught.value) or name == "query"


def test_everything_that_filters_checks():
    inputs = spoiled("noise", -0.3)
    filter_ = exact()
    for use in (
        filter_.run,
        filter_.absorb,
        lambda inputs: filter_.forecast(filter_.initial(), inputs),
        lambda inputs: smooth(filter_, inputs),
    ):
        with pytest.raises(ModelError, match="step 5: its scale"):
            use(inputs)


def test_the_first_step_at_fault_is_named():
    inputs = {**spoiled("noise", -0.3), "noise": jnp.array([0.1, 0.2, -1.0, 0.2, -2.0, 0.1])}
    with pytest.raises(ModelError, match="step 3: its scale is -1"):
        exact().check(inputs)


def test_good_inputs_pass_and_inside_jit_nothing_is_checked():
    exact().check(draw(None, STEPS))
    assert jax.jit(lambda inputs: exact().check(inputs))(spoiled("noise", -0.3)) is None


def test_values_that_are_replaced_need_not_be_finite():
    observed = jnp.zeros((STEPS, 2 * V))
    exact().check(spoiled("value", jnp.nan), observed)
    with pytest.raises(ModelError, match="`observed` is not finite at step 2"):
        exact().check(draw(None, STEPS), observed.at[1, 0].set(jnp.nan))


def test_lengths_that_differ_are_named():
    inputs = {**draw(None, STEPS), "noise": jnp.ones(3)}
    with pytest.raises(ModelError, match=r"`inputs` have lengths .*'noise': 3"):
        exact().check(inputs)
