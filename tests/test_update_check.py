"""A hand-derived update is found exact where it is, and wrong where it first departs."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.linalg import block_diag

from design_models import (
    DesignModel,
    ModelError,
    associative_regression,
    increment_evidence,
    independent_entries,
)
from inference.derivation import draft
from inference.oracles import nuts
from inference.update_check import check_update

draft_once = cache(draft)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# -- right updates -------------------------------------------------------------------------------

SHARED_ROWS = associative_regression(2, 2, decay="scalar", drift="scalar")


def regression_update(mean, covariance, u):
    mean = mean * u["decay"]
    covariance = covariance * u["decay"] ** 2 + u["drift"] * jnp.eye(2)
    gain = covariance @ u["key"] / (u["key"] @ covariance @ u["key"] + u["noise"])
    mean = mean + jnp.outer(u["value"] - mean @ u["key"], gain)
    return mean, covariance - jnp.outer(gain, u["key"] @ covariance)


ENTRIES = independent_entries(2, 2)


def entries_update(mean, covariance, u):
    variance = jnp.diag(covariance).reshape(2, 2) * u["decay"] ** 2 + u["drift"]
    precision = 1 / variance + u["key"] ** 2 / u["noise"][:, None]
    information = mean * u["decay"] / variance + jnp.outer(u["value"] / u["noise"], u["key"])
    return information / precision, jnp.diag(1 / precision.ravel())


INCREMENTS = increment_evidence(2, 2, decay="scalar")


def increments_update(mean, covariance, u):
    left = u["drift"] * u["noise"] / (u["drift"] + u["noise"])
    mean = u["decay"] * mean + jnp.outer(u["value"], u["key"])
    return mean, u["decay"] ** 2 * covariance + left * jnp.eye(len(covariance))


def _level_prior():
    level = numpyro.sample("level", dist.Normal(0.5, 1.0))
    slopes = numpyro.sample("slopes", dist.Normal(jnp.zeros(2), 0.5).to_event(1))
    return {"level": level, "slopes": slopes}


def _level_transition(memory, u):
    level = memory["level"] + u["time"] * jnp.sum(memory["slopes"])
    return {
        "level": numpyro.sample("level", dist.Normal(level, 0.3)),
        "slopes": numpyro.sample("slopes", dist.Normal(memory["slopes"], 0.1).to_event(1)),
    }


def _level_observe(memory, u):
    seen = memory["level"] + u["key"] @ memory["slopes"]
    numpyro.sample("value", dist.Normal(seen, jnp.sqrt(u["noise"])), obs=u["value"])


def _level_inputs(rng, steps):
    rngs = jax.random.split(rng, 4)
    return {
        "time": jax.random.uniform(rngs[0], (steps,), minval=0.1, maxval=1.0),
        "key": jax.random.normal(rngs[1], (steps, 2)),
        "noise": jax.random.uniform(rngs[2], (steps,), minval=0.1, maxval=0.6),
        "value": jax.random.normal(rngs[3], (steps,)),
    }


LEVEL = DesignModel(
    _level_prior,
    _level_transition,
    _level_observe,
    lambda memory, u: memory["level"],
    _level_inputs,
)
"""A memory of two arrays whose entries all correlate."""


def level_update(mean, covariance, u):
    flat = jnp.concatenate([mean["level"][None], mean["slopes"]])
    moves = jnp.eye(3).at[0, 1:].set(u["time"])
    flat = moves @ flat
    covariance = moves @ covariance @ moves.T + block_diag(jnp.eye(1) * 0.09, jnp.eye(2) * 0.01)
    reads = jnp.concatenate([jnp.ones(1), u["key"]])
    gain = covariance @ reads / (reads @ covariance @ reads + u["noise"])
    flat = flat + gain * (u["value"] - reads @ flat)
    covariance = covariance - jnp.outer(gain, reads @ covariance)
    return {"level": flat[0], "slopes": flat[1:]}, covariance


SCALAR = DesignModel(
    lambda: numpyro.sample("memory", dist.Normal(1.0, 2.0)),
    lambda memory, u: numpyro.sample("memory", dist.Normal(u["decay"] * memory, 0.5)),
    lambda memory, u: numpyro.sample("value", dist.Normal(memory, u["width"]), obs=u["value"]),
    lambda memory, u: memory,
    lambda rng, steps: {
        name: jax.random.uniform(jax.random.fold_in(rng, number), (steps,), minval=0.5)
        for number, name in enumerate(("decay", "width", "value"))
    },
)


def scalar_update(mean, covariance, u):
    mean, covariance = u["decay"] * mean, u["decay"] ** 2 * covariance + 0.25
    gain = covariance[0, 0] / (covariance[0, 0] + u["width"] ** 2)
    return mean + gain * (u["value"] - mean), (1 - gain) * covariance


RIGHT = {
    "shared rows": (SHARED_ROWS, regression_update),
    "independent entries": (ENTRIES, entries_update),
    "several arrays": (LEVEL, level_update),
    "increments": (INCREMENTS, increments_update),
    "scalar": (SCALAR, scalar_update),
}


@pytest.mark.parametrize(("model", "update"), RIGHT.values(), ids=RIGHT)
def test_a_right_update_is_exact(model, update):
    verdict = check_update(draft_once(model), update)
    assert verdict.exact
    assert verdict.worst < 1e-9
    assert verdict.sequences >= 3
    assert verdict.words.startswith("exact: ")


# -- wrong ones ----------------------------------------------------------------------------------


def _reset(mean, covariance, u):
    return regression_update(mean, jnp.eye(2), u)


def _large_gain(mean, covariance, u):
    before = mean * u["decay"]
    after, covariance = regression_update(mean, covariance, u)
    return before + 1.05 * (after - before), covariance


def _no_drift(mean, covariance, u):
    return regression_update(mean, covariance, {**u, "drift": 0.0})


def _late_decay(mean, covariance, u):
    drifted = covariance + u["drift"] * jnp.eye(2)
    mean, covariance = regression_update(mean, drifted, {**u, "decay": 1.0, "drift": 0.0})
    return mean * u["decay"], covariance * u["decay"] ** 2


def _large_noise(mean, covariance, u):
    return regression_update(mean, covariance, {**u, "noise": 1.05 * u["noise"]})


def _same_covariance(mean, covariance, u):
    return regression_update(mean, covariance, u)[0], covariance


class _LateFault:
    """Right for two steps, then without drift: only a counter tells."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, mean, covariance, u):
        self.calls += 1
        return (regression_update if self.calls < 3 else _no_drift)(mean, covariance, u)


WRONG = {
    "covariance reset": (_reset, 2, "mean"),
    "gain 5 % up": (_large_gain, 1, "mean"),
    "no drift": (_no_drift, 1, "mean"),
    "decay after the write": (_late_decay, 1, "mean"),
    "noise 5 % up": (_large_noise, 1, "mean"),
    "covariance not updated": (_same_covariance, 1, "covariance"),
    "wrong from step 3": (_LateFault(), 3, "mean"),
}


def _sampler(model):
    """Draws of the posterior of SHARED_ROWS as NUTS would bring them, but from its closed form."""

    def sample(inputs, seen, seed):
        mean, covariance = jnp.zeros((2, 2)), jnp.eye(2)
        for t in range(len(seen)):
            u = {name: array[t] for name, array in inputs.items()}
            mean, covariance = regression_update(mean, covariance, u)
        normal = np.random.default_rng(seed).normal(size=(4, 1000, 2, 2))
        memory = np.asarray(mean) + normal @ np.linalg.cholesky(np.asarray(covariance)).T
        memory = memory.reshape(4, 1000, 4)
        return nuts.Posterior(memory, memory[..., :2], 1.0, 4000.0, 0)

    return sample


@pytest.mark.parametrize(("update", "step", "quantity"), WRONG.values(), ids=WRONG)
def test_a_wrong_update_is_caught_at_the_step_and_quantity_it_departs_in(
    update, step, quantity, monkeypatch
):
    monkeypatch.setattr(nuts, "sampler", _sampler)
    verdict = check_update(draft_once(SHARED_ROWS), update)
    assert not verdict.exact
    assert (verdict.step, verdict.quantity) == (step, quantity)
    assert verdict.departure > 1e-3
    assert verdict.reference < 4.5  # the exact filter agrees with the draws
    if verdict.departure > 0.3:  # what the draws can tell, they do
        assert verdict.standard_errors > 10
    assert f"the {quantity} departs at step {step} by" in verdict.words


@pytest.mark.nuts
def test_chains_on_the_model_tell_a_wrong_update_from_the_exact_filter(monkeypatch):
    monkeypatch.setattr(nuts, "_MOST_DRAWS", 1000)
    verdict = check_update(draft_once(SHARED_ROWS), _same_covariance)
    assert (verdict.step, verdict.quantity) == (1, "covariance")
    assert verdict.standard_errors > 10
    assert verdict.reference < 4.5


def test_an_update_that_is_right_at_the_default_inputs_alone_is_caught(monkeypatch):
    """The noise is bounded from below, by less than the defaults."""
    monkeypatch.setattr(nuts, "sampler", _sampler)

    def bounded(mean, covariance, u):
        return regression_update(mean, covariance, {**u, "noise": jnp.maximum(u["noise"], 0.1)})

    verdict = check_update(draft_once(SHARED_ROWS), bounded)
    assert not verdict.exact
    assert verdict.sequences > 3


# -- updates that cannot be judged ---------------------------------------------------------------


def _raises(mean, covariance, u):
    return mean * u["forget"], covariance


REFUSED = {
    "raises": (_raises, r"`_raises` raised KeyError: 'forget' \(.*test_update_check.py:\d+"),
    "one array": (lambda mean, covariance, u: mean, "return the pair"),
    "mean of another shape": (
        lambda mean, covariance, u: (mean[0], covariance),
        r"returned a mean of shapes \[\(2,\)\]",
    ),
    "covariance over all entries": (
        lambda mean, covariance, u: (mean, jnp.eye(4)),
        r"returned a covariance of shape \(4, 4\); this filter's is \(2, 2\)",
    ),
    "words": (lambda mean, covariance, u: ("mean", covariance), "something else than arrays"),
    "not a number": (
        lambda mean, covariance, u: (mean / 0, covariance),
        "a mean with NaN or infinite entries at step 1",
    ),
}


@pytest.mark.parametrize(("update", "says"), REFUSED.values(), ids=REFUSED)
def test_an_update_that_returns_no_belief_is_refused(update, says):
    with pytest.raises(ModelError, match=says) as refused:
        check_update(draft_once(SHARED_ROWS), update)
    assert "\n" not in str(refused.value)
