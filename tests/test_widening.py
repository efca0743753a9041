"""A filter derived at small widths, carried over to large ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from design_models import CATALOGUE, DesignModel, ModelError, associative_regression
from inference.derivation import draft, widen
from inference.errors import NotLinearGaussian

WIDENED = [
    "linear_attention",
    "gla",
    "bayesian_layer",
    "deltaproduct",
    "kalman_linear_attention",
]
"""One entry for each way in which a memory falls into blocks, and one of two observations."""


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", WIDENED)
def test_a_widened_filter_is_the_one_derived_at_that_width(name):
    design = CATALOGUE[name].model
    wide, direct = widen(draft(design(3, 2)), design(4, 5)), draft(design(4, 5))
    for own in ("states", "evidence", "observed"):
        np.testing.assert_array_equal(getattr(wide.partition, own), getattr(direct.partition, own))
    assert wide.structure.kind == direct.structure.kind


@pytest.mark.parametrize("width", [64, 128])
def test_a_widened_bayesian_layer_takes_a_ridge_step_at_full_size(width):
    wide = widen(draft(associative_regression(3, 2)), associative_regression(width, width))
    assert wide.partition.states.shape == (1, width, width)
    inputs = wide.model.draw_inputs(jax.random.key(0), 1)
    filtered = jax.jit(wide.run)(inputs)
    key, value, noise = (np.asarray(inputs[name][0]) for name in ("key", "value", "noise"))
    covariance = np.linalg.inv(np.eye(width) + np.outer(key, key) / noise)
    np.testing.assert_allclose(filtered.covariances[0], covariance, atol=1e-10)
    np.testing.assert_allclose(
        filtered.means[0], np.outer(value, covariance @ key / noise), atol=1e-10
    )


def normal_prior(value_width, key_width):
    mean = jnp.zeros((value_width, key_width))
    return numpyro.sample("memory", dist.Normal(mean, 1.0).to_event(2))


def read_noisily(memory, u):
    value = dist.Normal(memory @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
    numpyro.sample("value", value, obs=u["value"])


def still(value_width, key_width, observe=read_noisily):
    return DesignModel(
        partial(normal_prior, value_width, key_width), lambda memory, u: memory, observe
    )


def test_a_model_whose_rows_part_at_the_larger_width_is_refused():
    """Up to three rows share a noise; a fourth would have its own."""

    def observe(memory, u):
        noise = jnp.where(jnp.arange(len(memory)) < 3, u["noise"], 2 * u["noise"])
        value = dist.Normal(memory @ u["key"], jnp.sqrt(noise)).to_event(1)
        numpyro.sample("value", value, obs=u["value"])

    with pytest.raises(NotLinearGaussian, match="disagrees"):
        widen(draft(still(3, 2, observe)), still(5, 2, observe))


def test_a_model_whose_keys_mix_rows_at_the_larger_width_is_refused():
    def observe(memory, u):
        mean = memory @ u["key"] + (len(memory) > 3) * memory[0, 0]
        value = dist.Normal(mean, jnp.sqrt(u["noise"])).to_event(1)
        numpyro.sample("value", value, obs=u["value"])

    with pytest.raises(NotLinearGaussian, match="disagrees"):
        widen(draft(still(3, 2, observe)), still(5, 2, observe))


def test_a_dense_memory_does_not_carry_over():
    def model(value_width, key_width):
        def transition(memory, u):
            common = numpyro.sample("common", dist.Normal(0.0, jnp.sqrt(u["drift"])))
            return memory + common

        prior = partial(normal_prior, value_width, key_width)
        return DesignModel(prior, transition, read_noisily)

    with pytest.raises(ModelError, match="neither its rows, columns nor entries"):
        widen(draft(model(3, 2)), model(4, 5))


def test_a_memory_of_several_arrays_is_not_widened():
    def model(value_width, key_width):
        def prior():
            shape = (value_width, key_width)
            return tuple(
                numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(2))
                for name in ("fast", "slow")
            )

        def observe(memory, u):
            read_noisily(memory[0] + memory[1], u)

        def readout(memory, u):
            return (memory[0] + memory[1]) @ u["query"]

        return DesignModel(prior, lambda memory, u: memory, observe, readout)

    with pytest.raises(ModelError, match=r"only one \(value, key\) array is widened"):
        widen(draft(model(3, 2)), model(4, 5))
