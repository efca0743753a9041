"""Every fault of a model is refused wherever it stands: in each of its four functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from numpyro import handlers

from design_models import DesignModel
from inference import NotLinearGaussian
from inference.derivation import draft

WIDTH = 2
Plant = Callable[[jax.Array, jax.Array | None], object]
"""plant(z, value): a site named "bad" about the latent vector z, observed where value is given."""


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.custom_jvp
def half_derivative(x):
    return x


half_derivative.defjvp(lambda primals, tangents: (primals[0], 0.5 * tangents[0]))


def sample(noise, value):
    numpyro.sample("bad", noise.to_event(1), obs=value)


def masked_by_handler(z, value):
    with handlers.mask(mask=jnp.array([True, False])):
        numpyro.sample("bad", dist.Normal(z, 1.0), obs=value)


def scaled(z, value):
    with handlers.scale(scale=2.0):
        sample(dist.Normal(z, 1.0), value)


def subsampled(z, value):
    with numpyro.plate("bad", 2 * WIDTH, subsample_size=WIDTH):
        numpyro.sample("row", dist.Normal(z, 1.0), obs=value)


def weighted_delta(z, value):
    numpyro.sample("bad", dist.Delta(z, log_density=jnp.sum(z), event_dim=1), obs=value)


def discrete(z, value):
    observed = None if value is None else jnp.where(value > 0, 1, 0)
    sample(dist.Bernoulli(logits=z), observed)


def too_wide(z, value):
    noise = dist.Normal(jnp.concatenate([z, z, z]), 1.0).to_event(1)
    observed = jnp.zeros(WIDTH + 3) if value is None else value
    numpyro.sample("bad", noise, obs=observed)


FAULTS: dict[str, Plant] = {
    "Student-t noise": lambda z, value: sample(dist.StudentT(4.0, z, 1.0), value),
    "nonlinear mean": lambda z, value: sample(dist.Normal(jnp.tanh(z), 1.0), value),
    "scale depends on the state": lambda z, value: sample(dist.Normal(z, jnp.exp(z)), value),
    "product of latents": lambda z, value: sample(dist.Normal(z * z[::-1], 1.0), value),
    "bounded support": lambda z, value: sample(dist.TruncatedNormal(z, 1.0, low=-9.0), value),
    "masked distribution": lambda z, value: sample(dist.Normal(z, 1.0).mask(False), value),
    "mask handler": masked_by_handler,
    "factor": lambda z, value: numpyro.factor("bad", jnp.sum(z)),
    "scale handler": scaled,
    "subsampled plate": subsampled,
    "stop_gradient": lambda z, value: sample(dist.Normal(lax.stop_gradient(z), 1.0), value),
    "custom derivative": lambda z, value: sample(dist.Normal(half_derivative(z), 1.0), value),
    "Delta with a density": weighted_delta,
    "discrete site": discrete,
    "NaN noise": lambda z, value: sample(dist.Normal(z, jnp.nan), value),
    "negative noise": lambda z, value: sample(dist.Normal(z, -1.0), value),
    "zero noise": lambda z, value: sample(dist.Normal(z, 0.0), value),
    "infinite mean": lambda z, value: sample(dist.Normal(z + jnp.inf, 1.0), value),
    "shapes that do not match": too_wide,
}
ROLES = ("prior", "transition", "observe", "readout")


def with_fault(role: str, plant: Plant | None) -> DesignModel:
    """A good model, with a fault planted in one of its functions."""

    def planted(where, z, value=None):
        if where == role and plant is not None:
            plant(z, value)

    def prior():
        S: Any = numpyro.sample("S", dist.Normal(jnp.zeros((WIDTH, WIDTH)), 1.3).to_event(2))
        planted("prior", S[0])
        return S

    def transition(S, u):
        moved: Any = numpyro.sample("S", dist.Normal(0.9 * S, 0.2).to_event(2))
        planted("transition", moved[0])
        return moved

    def observe(S, u):
        numpyro.sample("v", dist.Normal(S @ u["key"], 0.5).to_event(1), obs=u["value"])
        planted("observe", S[0], u["value"])

    def readout(S, u):
        planted("readout", S[0])
        return S @ u["query"]

    return DesignModel(prior, transition, observe, readout)


def derived(model: DesignModel):
    steps = jnp.ones((2, WIDTH))
    return draft(model, {"key": steps, "query": steps, "value": 0.3 * steps})


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_in_every_function(fault, role):
    with pytest.raises(NotLinearGaussian) as caught:
        derived(with_fault(role, FAULTS[fault]))
    refusal = caught.value
    assert (refusal.function, refusal.site) == (role, "bad")
    assert refusal.location.startswith(f"{__file__}:")


def test_the_model_without_a_fault_is_accepted():
    assert derived(with_fault("none", None)).structure.kind == "shared rows"
