"""What is refused of whole models, with the function it falls to, site, reason and line."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from design_models import ModelError, from_scan
from inference import NotLinearGaussian, NotSupported
from inference.derivation import draft

V, K = 3, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(rng, steps):
    keys = jax.random.split(rng, 5)
    return {
        "key": jax.random.normal(keys[0], (steps, K)),
        "value": jax.random.normal(keys[1], (steps, V)),
        "noise": jax.random.uniform(keys[2], (steps,), minval=0.1),
        "decay": jax.random.uniform(keys[3], (steps,), minval=0.5),
        "drift": jax.random.uniform(keys[4], (steps,), minval=0.1),
    }


def start():
    return numpyro.sample("start", dist.Normal(jnp.zeros((V, K)), 1.0).to_event(2))


def move(memory, u):
    return numpyro.sample("memory", dist.Normal(memory * u["decay"], u["drift"]).to_event(2))


def read(memory, u):
    numpyro.sample("value", dist.Normal(memory @ u["key"], u["noise"]).to_event(1), obs=u["value"])


def whole(start=start, move=move, read=read):
    def model(inputs):
        def step(memory, u):
            memory = move(memory, u)
            read(memory, u)
            return memory, None

        scan(step, start(), inputs)

    return model


@dataclass(frozen=True)
class Refusal:
    """A whole model, and what must be said of it. The line at fault is marked `# here`."""

    model: Callable[..., Any]
    function: str
    site: str
    words: str
    kind: type[NotLinearGaussian]
    location: str


REFUSED: dict[str, Refusal] = {}


def refused(part, function, site, words, kind=NotLinearGaussian):
    """Register a start, move or read that makes the good model one to be refused."""

    def register(fault):
        source, first = inspect.getsourcelines(fault)
        (marked,) = [first + i for i, line in enumerate(source) if line.rstrip().endswith("# here")]
        location = f"{__file__}:{marked} ("
        REFUSED[fault.__name__] = Refusal(
            whole(**{part: fault}), function, site, words, kind, location
        )
        return fault

    return register


# The start, which is the prior.


@refused("start", "prior", "start", "StudentT is not Gaussian")
def student_t_start():
    return numpyro.sample("start", dist.StudentT(4.0, jnp.zeros((V, K))).to_event(2))  # here


@refused("start", "prior", "start", "support")
def positive_start():
    return numpyro.sample("start", dist.HalfNormal(jnp.ones((V, K))).to_event(2))  # here


@refused("start", "prior", "start", "its scale is 0; it must be")
def start_without_noise():
    return numpyro.sample("start", dist.Normal(jnp.zeros((V, K)), 0.0).to_event(2))  # here


@refused("start", "prior", "start", "its scale is nan; it must be")
def start_of_nan():
    return numpyro.sample("start", dist.Normal(jnp.zeros((V, K)), jnp.nan).to_event(2))  # here


@refused("start", "prior", "fit", "factor", NotSupported)
def start_with_a_factor():
    numpyro.factor("fit", -1.0)  # here
    return start()


@refused("start", "prior", "", "not affine in the memory: `exp`")
def nonlinear_start():
    return jnp.exp(start())  # here


@refused("start", "prior", "", "raised TypeError", NotSupported)
def start_of_shapes_that_do_not_match():
    return start() @ jnp.ones(K + 1)  # here


# The move from memory to memory.


@refused("move", "transition", "memory", "StudentT is not Gaussian")
def student_t_drift(memory, u):
    return numpyro.sample("memory", dist.StudentT(4.0, memory, u["drift"]).to_event(2))  # here


@refused("move", "transition", "memory", "mean is not affine in the memory: `tanh`")
def nonlinear_move(memory, u):
    mean = jnp.tanh(memory)  # here
    return numpyro.sample("memory", dist.Normal(mean, u["drift"]).to_event(2))


@refused("move", "transition", "memory", "its scale depends on the memory")
def drift_of_memory(memory, u):
    scale = jnp.exp(memory)  # here
    return numpyro.sample("memory", dist.Normal(memory, scale).to_event(2))


@refused("move", "transition", "memory", "mean is not affine in the memory")
def product_of_latents(memory, u):
    gate = numpyro.sample("gate", dist.Normal(0.0, 1.0))
    return numpyro.sample("memory", dist.Normal(gate * memory, 1.0).to_event(2))  # here


@refused("move", "transition", "gate", "support")
def bounded_gate(memory, u):
    gate = numpyro.sample("gate", dist.Beta(2.0, 2.0))  # here
    return numpyro.sample("memory", dist.Normal(memory + gate, 1.0).to_event(2))


@refused("move", "transition", "gate", "support")
def discrete_gate(memory, u):
    gate = numpyro.sample("gate", dist.Bernoulli(0.5))  # here
    return numpyro.sample("memory", dist.Normal(memory + gate, 1.0).to_event(2))


@refused("move", "transition", "memory", "masks", NotSupported)
def masked_move(memory, u):
    with handlers.mask(mask=u["drift"] > 0):
        return numpyro.sample("memory", dist.Normal(memory, 1.0).to_event(2))  # here


@refused("move", "transition", "fit", "factor", NotSupported)
def factor_of_memory(memory, u):
    numpyro.factor("fit", -jnp.sum(memory**2))  # here
    return move(memory, u)


@refused("move", "transition", "memory", "re-weight", NotSupported)
def scaled_move(memory, u):
    with handlers.scale(scale=2.0):
        return numpyro.sample("memory", dist.Normal(memory, 1.0).to_event(2))  # here


@refused("move", "transition", "memory", "stop_gradient")
def stopped_gradient(memory, u):
    mean = lax.stop_gradient(memory)  # here
    return numpyro.sample("memory", dist.Normal(mean, 1.0).to_event(2))


@jax.custom_jvp
def doubled_derivative(x):
    return x


doubled_derivative.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@refused("move", "transition", "memory", "custom derivative")
def custom_derivative(memory, u):
    mean = doubled_derivative(memory)  # here
    return numpyro.sample("memory", dist.Normal(mean, 1.0).to_event(2))


@refused("move", "transition", "memory", "its log_density re-weights the memory")
def weighted_delta(memory, u):
    weight = -jnp.sum(memory**2)
    return numpyro.sample("memory", dist.Delta(memory, weight, event_dim=2))  # here


@refused("move", "transition", "memory", "its scale is -")
def negative_drift(memory, u):
    return numpyro.sample("memory", dist.Normal(memory, -u["drift"]).to_event(2))  # here


@refused("move", "transition", "", "Python needs the value of an input", NotSupported)
def if_on_an_input(memory, u):
    if u["decay"] > 0.5:  # here
        return move(memory, u)
    return memory


@refused("move", "transition", "", "Python needs the value of a latent")
def if_on_the_memory(memory, u):
    if memory[0, 0] > 0.5:  # here
        return move(memory, u)
    return memory


@refused("move", "transition", "", "raised TypeError", NotSupported)
def shapes_that_do_not_match(memory, u):
    return memory @ jnp.ones(K + 1)  # here


# What is observed.


@refused("read", "observe", "value", "StudentT is not Gaussian")
def student_t_noise(memory, u):
    law = dist.StudentT(4.0, memory @ u["key"], u["noise"]).to_event(1)
    numpyro.sample("value", law, obs=u["value"])  # here


@refused("read", "observe", "value", "mean is not affine in the memory: `tanh`")
def nonlinear_reading(memory, u):
    mean = jnp.tanh(memory @ u["key"])  # here
    numpyro.sample("value", dist.Normal(mean, u["noise"]).to_event(1), obs=u["value"])


@refused("read", "observe", "value", "its scale depends on the memory")
def noise_of_memory(memory, u):
    scale = jnp.exp(memory[0, 0])  # here
    numpyro.sample("value", dist.Normal(memory @ u["key"], scale).to_event(1), obs=u["value"])


@refused("read", "observe", "value", "support")
def bernoulli_values(memory, u):
    law = dist.Bernoulli(logits=memory @ u["key"]).to_event(1)
    numpyro.sample("value", law, obs=jnp.where(u["value"] > 0, 1, 0))  # here


@refused("read", "observe", "value", "masks", NotSupported)
def masked_reading(memory, u):
    law = dist.Normal(memory @ u["key"], 1.0).mask(jnp.arange(V) < 1).to_event(1)
    numpyro.sample("value", law, obs=u["value"])  # here


@refused("read", "transition", "rows", "subsampled", NotSupported)
def subsampled_rows(memory, u):
    with numpyro.plate("rows", V, subsample_size=1) as rows:  # here
        numpyro.sample("value", dist.Normal((memory @ u["key"])[rows], 1.0), obs=u["value"][rows])


@refused("read", "observe", "value", "re-weight", NotSupported)
def scaled_reading(memory, u):
    law = dist.Normal(memory @ u["key"], 1.0).to_event(1)
    with handlers.scale(scale=2.0):
        numpyro.sample("value", law, obs=u["value"])  # here


@refused("read", "observe", "value", "its scale is 0; it must be")
def noiseless_reading(memory, u):
    numpyro.sample("value", dist.Normal(memory @ u["key"], 0.0).to_event(1), obs=u["value"])  # here


@refused("read", "observe", "value", "its scale is nan; it must be")
def noise_of_nan(memory, u):
    law = dist.Normal(memory @ u["key"], jnp.nan).to_event(1)
    numpyro.sample("value", law, obs=u["value"])  # here


@refused("read", "transition", "value", "obs has shape", NotSupported)
def value_of_another_shape(memory, u):
    numpyro.sample("value", dist.Normal(memory @ u["key"], 1.0).to_event(1), obs=u["key"])  # here


@pytest.mark.parametrize("name", REFUSED)
def test_whole_model_is_refused_by_function_site_reason_and_line(name):
    case = REFUSED[name]
    with pytest.raises(NotLinearGaussian) as caught:
        draft(from_scan(case.model, draw))
    error = caught.value
    assert (error.function, error.site) == (case.function, case.site)
    assert case.words in error.reason
    assert type(error) is case.kind
    assert error.location.startswith(case.location)


@pytest.mark.parametrize("part", ["start", "move", "read"])
def test_an_error_of_the_users_own_is_no_refusal(part):
    def fail(*arguments):
        raise ValueError("no such gate")

    line = fail.__code__.co_firstlineno + 1
    with pytest.raises(ModelError) as caught:
        draft(from_scan(whole(**{part: fail}), draw))
    assert "raised ValueError: no such gate" in str(caught.value)
    assert f"{__file__}:{line} (" in str(caught.value)
