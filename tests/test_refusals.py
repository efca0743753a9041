"""What `derive` refuses, with function, site, reason and line, and what it accepts.

Every accepted model is compared with its joint density, conditioned densely. The density is only
evaluated, never differentiated, so that no custom derivative can fool both sides.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from dense_conditioning import assert_filter_conditions_densely, condition_densely
from jax import lax
from numpyro import handlers
from numpyro.contrib import control_flow
from numpyro.distributions import constraints, transforms
from numpyro.infer import reparam

from design_models import DesignModel, ModelError
from inference import NotLinearGaussian, NotSupported, derive
from inference.derivation import draft

STEPS, WIDTH = 2, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw_inputs(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    drawn = {
        "key": rng.normal(size=(STEPS, WIDTH)),
        "query": rng.normal(size=(STEPS, WIDTH)),
        "value": rng.normal(size=(STEPS, WIDTH)),
        "decay": rng.uniform(0.5, 1, STEPS),
        "drift": rng.uniform(0.1, 0.5, STEPS),
        "noise": rng.uniform(0.1, 0.5, STEPS),
        "slot": rng.integers(0, WIDTH, STEPS),
    }
    return {name: jnp.asarray(array) for name, array in drawn.items()}


def normal_prior():
    return numpyro.sample("S", dist.Normal(jnp.zeros((WIDTH, WIDTH)), 1.3).to_event(2))


def decaying(S, u):
    return numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]).to_event(2))


def linear_reading(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], u["noise"]).to_event(1), obs=u["value"])


BASE = DesignModel(normal_prior, decaying, linear_reading)


@dataclass(frozen=True)
class Refusal:
    """A model, and what must be said of it. The line at fault is marked `# here`."""

    model: DesignModel
    function: str
    site: str
    words: str
    kind: type[NotLinearGaussian]
    location: str


REFUSED: dict[str, Refusal] = {}
ACCEPTED: dict[str, DesignModel] = {}


def refused(
    role: str,
    site: str,
    words: str,
    kind: type[NotLinearGaussian] = NotLinearGaussian,
    fault: str = "",
    **others: Callable[..., Any],
) -> Callable[..., Any]:
    """Register a function that makes the base model one to be refused."""

    def register(function):
        source, first = inspect.getsourcelines(function)
        marked = [first + i for i, line in enumerate(source) if line.rstrip().endswith("# here")]
        location = f"{__file__}:{marked[0]} (" if marked else ""
        model = replace(BASE, **{role: function}, **others)
        name = function.__name__
        assert name not in REFUSED
        REFUSED[name] = Refusal(model, fault or role, site, words, kind, location)
        return function

    return register


def accepted(role: str, **others: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function that makes the base model another good one."""

    def register(function):
        assert function.__name__ not in ACCEPTED
        ACCEPTED[function.__name__] = replace(BASE, **{role: function}, **others)
        return function

    return register


# Noise that is not Gaussian.


@refused("observe", "v", "StudentT is not Gaussian")
def student_t_noise(S, u):
    numpyro.sample("v", dist.StudentT(4.0, S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "Laplace is not Gaussian")
def laplace_noise(S, u):
    numpyro.sample("v", dist.Laplace(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "not Gaussian")
def mixture_noise(S, u):
    mean = S @ u["key"]
    parts = dist.Normal(jnp.stack([mean, mean + 1], -1), 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), parts)
    numpyro.sample("v", mixture.to_event(1), obs=u["value"])  # here


@refused("transition", "S", "MultivariateStudentT is not Gaussian")
def multivariate_student_t_drift(S, u):
    return numpyro.sample("S", dist.MultivariateStudentT(3.0, S, jnp.eye(2)).to_event(1))  # here


@refused("transition", "S", "not Gaussian")
def nonlinear_diffusion(S, u):
    walk = dist.EulerMaruyama(
        jnp.arange(3.0), lambda x, t: (-(x**3), 1.0), dist.Normal(0.0, 1.0).expand([2])
    )
    return numpyro.sample("S", walk)[..., 1:] + S  # here


NOT_GAUSSIAN = {
    "cauchy": dist.Cauchy(0.0, 1.0),
    "gumbel": dist.Gumbel(0.0, 1.0),
    "logistic": dist.Logistic(0.0, 1.0),
    "soft_laplace": dist.SoftLaplace(0.0, 1.0),
    "asymmetric_laplace": dist.AsymmetricLaplace(0.0, 1.0, 0.6),
    "mixture": dist.MixtureGeneral(
        dist.Categorical(jnp.ones(2) / 2), [dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)]
    ),
    "half_normal": dist.HalfNormal(1.0),
    "truncated_normal": dist.TruncatedNormal(0.0, 1.0, low=-3.0),
    "doubly_truncated_normal": dist.TruncatedNormal(0.0, 1.0, low=-1e9, high=1e9),
    "folded_normal": dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
    "log_normal": dist.LogNormal(0.0, 1.0),
    "uniform": dist.Uniform(-1.0, 1.0),
    "gamma": dist.Gamma(2.0, 1.0),
    "beta": dist.Beta(2.0, 2.0),
    "exponential": dist.Exponential(1.0),
    "von_mises": dist.VonMises(0.0, 1.0),
    "improper_uniform": dist.ImproperUniform(constraints.real, (), ()),
    "improper_half_line": dist.ImproperUniform(constraints.positive, (), ()),
    "log_of_gamma": dist.TransformedDistribution(
        dist.Gamma(2.0, 1.0), transforms.ExpTransform().inv
    ),
    "softplus_of_normal": dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), transforms.SoftplusTransform()
    ),
    "bernoulli": dist.Bernoulli(0.5),
    "poisson": dist.Poisson(1.0),
    "categorical": dist.Categorical(jnp.ones(3) / 3),
}


@pytest.mark.parametrize("family", NOT_GAUSSIAN)
def test_prior_that_is_not_gaussian_is_refused(family):
    def prior():
        return jnp.ones((2, 2)) * numpyro.sample("S", NOT_GAUSSIAN[family].expand([2, 2]))

    with pytest.raises(NotLinearGaussian) as caught:
        derive(replace(BASE, prior=prior), draw_inputs())
    line = prior.__code__.co_firstlineno + 1
    assert (caught.value.function, caught.value.site) == ("prior", "S")
    assert caught.value.location.startswith(f"{__file__}:{line} (")


@refused("observe", "v", "support")
def bernoulli_values(S, u):
    values = jnp.where(u["value"] > 0, 1, 0)
    numpyro.sample("v", dist.Bernoulli(logits=S @ u["key"]).to_event(1), obs=values)  # here


@refused("observe", "v", "support")
def poisson_values(S, u):
    values = jnp.abs(jnp.round(u["value"])).astype(int)
    numpyro.sample("v", dist.Poisson(jnp.exp(S @ u["key"])).to_event(1), obs=values)  # here


@refused("observe", "tau", "support")
def uncertain_noise(S, u):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))  # here
    numpyro.sample("v", dist.Normal(S @ u["key"], tau).to_event(1), obs=u["value"])


# Means that are not affine.


@refused("observe", "v", "mean is not affine in the memory: `tanh`")
def tanh_mean(S, u):
    mean = jnp.tanh(S @ u["key"])  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "mean is not affine")
def softmax_mean(S, u):
    mean = jax.nn.softmax(S @ u["key"])  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "mean is not affine in the memory: `round`")
def rounded_mean(S, u):
    mean = jnp.round(S @ u["key"])  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "mean is not affine")
def relu_mean(S, u):
    mean = jax.nn.relu(S @ u["key"])  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "mean is not affine in the memory: `abs`")
def absolute_mean(S, u):
    mean = abs(S @ u["key"])  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("transition", "S", "mean is not affine in the memory: comparison")
def where_on_memory(S, u):
    mean = jnp.where(S > 0, S, 0.5 * S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "mean is not affine")
def clipped_memory(S, u):
    mean = jnp.clip(S, -1e6, 1e6)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "mean is not affine")
def normalised_memory(S, u):
    mean = S / jnp.linalg.norm(S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "mean is not affine")
def sorted_memory(S, u):
    mean = jnp.sort(S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("observe", "v", "rounding")
def memory_as_address(S, u):
    row = S[S.astype(int)[0, 0]]  # here
    numpyro.sample("v", dist.Normal(row, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "mean is not affine")
def product_of_entries(S, u):
    mean = S[:, 0] * S[:, 1]
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])  # here


@refused("transition", "S", "mean is not affine")
def product_with_a_latent(S, u):
    gate = numpyro.sample("gate", dist.Normal(0.0, 1.0))
    return numpyro.sample("S", dist.Normal(gate * S, 1.0).to_event(2))  # here


@refused("transition", "", "returns is not affine")  # here
def product_returned(S, u):
    gate = numpyro.sample("gate", dist.Normal(0.0, 1.0))
    return gate * S


@refused("transition", "", "returns is not affine in the memory: `tanh`")
def tanh_returned(S, u):
    return jnp.tanh(numpyro.sample("S", dist.Normal(S, 1.0).to_event(2)))  # here


@refused("readout", "", "returns is not affine in the memory: `tanh`")
def tanh_readout(S, u):
    return jnp.tanh(S @ u["query"])  # here


@refused("readout", "y", "mean is not affine")
def quadratic_readout(S, u):
    numpyro.sample("y", dist.Normal((S @ u["query"]) ** 2, 1.0).to_event(1))  # here


@refused("transition", "S", "mean is not affine")
def solve_by_memory(S, u):
    mean = jnp.linalg.solve(S + jnp.eye(2), jnp.eye(2))  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "mean is not affine")
def repeated_squaring(S, u):
    mean = lax.fori_loop(0, 2, lambda _, power: power @ power, S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


# Noise that depends on the memory, or is no noise.


@refused("observe", "v", "its scale depends on the memory")
def scale_of_memory(S, u):
    scale = jnp.exp(S[0, 0])  # here
    numpyro.sample("v", dist.Normal(S @ u["key"], scale).to_event(1), obs=u["value"])


@refused("observe", "v", "its scale depends on the memory")
def scale_affine_in_memory(S, u):
    numpyro.sample("v", dist.Normal(0, 5 + S[0, 0]).expand([2]).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "depends on the memory")
def covariance_of_memory(S, u):
    covariance = S @ S.T + jnp.eye(2)
    noise = dist.MultivariateNormal(S @ u["key"], covariance)
    numpyro.sample("v", noise, obs=u["value"])


@refused("transition", "S", "its scale depends on the memory")
def scale_of_a_latent(S, u):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    return numpyro.sample("S", dist.Normal(S, 2 + level).to_event(2))  # here


@refused("observe", "v", "it must be")
def scale_zero(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], 0.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "it must be")
def scale_negative(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], -1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "it must be")
def scale_nan(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], jnp.nan).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "not positive and finite")
def scale_infinite(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], jnp.inf).to_event(1), obs=u["value"])  # here


@refused("transition", "S", "it must be")
def one_scale_zero(S, u):
    scale = jnp.array([1.0, 0.0])
    return numpyro.sample("S", dist.Normal(S, scale).to_event(2))  # here


@refused("transition", "S", "it must be")
def mean_nan(S, u):
    return numpyro.sample("S", dist.Normal(S + jnp.log(-u["decay"]), 1.0).to_event(2))  # here


@refused("observe", "v", "it must be")
def covariance_indefinite(S, u):
    covariance = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    noise = dist.MultivariateNormal(S @ u["key"], covariance)
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "it must be")
def covariance_singular(S, u):
    noise = dist.MultivariateNormal(S @ u["key"], jnp.zeros((2, 2)))
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "it must be")
def cholesky_with_negative_diagonal(S, u):
    noise = dist.MultivariateNormal(S @ u["key"], scale_tril=jnp.diag(jnp.array([1.0, -1.0])))
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "it must be")
def cholesky_not_triangular(S, u):
    noise = dist.MultivariateNormal(S @ u["key"], scale_tril=jnp.array([[1.0, 0.5], [0.0, 1.0]]))
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "it must be")
def cholesky_infinite(S, u):
    noise = dist.MultivariateNormal(S @ u["key"], scale_tril=jnp.inf * jnp.eye(2))
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("prior", "S", "it must be")
def prior_scale_zero():
    return numpyro.sample("S", dist.Normal(jnp.zeros((2, 2)), 0.0).to_event(2))  # here


@refused("readout", "y", "it must be")
def readout_scale_negative(S, u):
    numpyro.sample("y", dist.Normal(S @ u["query"], -u["noise"]).to_event(1))  # here


# Weights on the density.


@refused("observe", "v", "masks", NotSupported)
def masked_distribution(S, u):
    noise = dist.Normal(S @ u["key"], 1.0).mask(jnp.arange(2) < 1).to_event(1)
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "masks", NotSupported)
def mask_inside_expand(S, u):
    noise = dist.Normal(0.0, 1.0).mask(jnp.array(False)).expand([2]).to_event(1)
    numpyro.sample("v", noise, obs=u["value"])  # here


@refused("observe", "v", "masks", NotSupported)
def mask_handler(S, u):
    with handlers.mask(mask=u["noise"] > 0):
        numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v_observed", "masks", NotSupported)
def mask_of_missing_values(S, u):
    with numpyro.plate("rows", 2):
        noise = dist.Normal(S @ u["key"], 1.0)
        numpyro.sample("v", noise, obs=u["value"], obs_mask=u["value"] > 0)  # here


@refused("transition", "penalty", "factor", NotSupported)
def factor(S, u):
    numpyro.factor("penalty", -(jnp.sum(S) ** 2))  # here
    return decaying(S, u)


@refused("transition", "constant", "factor", NotSupported)
def constant_factor(S, u):
    numpyro.factor("constant", -3.0)  # here
    return decaying(S, u)


@refused("observe", "rows", "subsampled", NotSupported)
def subsampled_plate(S, u):
    with numpyro.plate("rows", 2, subsample_size=1) as rows:  # here
        numpyro.sample("v", dist.Normal((S @ u["key"])[rows], 1.0), obs=u["value"][rows])


@refused("observe", "v", "re-weight", NotSupported)
def scale_handler(S, u):
    with handlers.scale(scale=2.0):
        numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("transition", "S", "its log_density re-weights the memory")
def delta_with_density_of_memory(S, u):
    return numpyro.sample("S", dist.Delta(0.9 * S, log_density=-(S**2)))  # here


@refused("transition", "S", "log_density")
def delta_with_constant_density(S, u):
    return numpyro.sample("S", dist.Delta(0.9 * S, log_density=-1.0, event_dim=2))  # here


@refused("observe", "v", "observed Delta", NotSupported)
def observed_delta(S, u):
    numpyro.sample("v", dist.Delta(S @ u["key"]).to_event(1), obs=u["value"])  # here


class HiddenDelta(dist.Delta):
    def log_prob(self, value):
        return -jnp.sum(self.v**2)


@refused("transition", "S", "HiddenDelta")
def delta_with_hidden_density(S, u):
    return numpyro.sample("S", HiddenDelta(0.9 * S, event_dim=2))  # here


class HiddenFactor(dist.Normal):
    """A Normal whose log density holds a factor that is quadratic in its mean."""

    def log_prob(self, value):
        return super().log_prob(value) - 0.1 * self.loc**2


@refused("observe", "v", "hidden factor")
def hidden_factor_of_memory(S, u):
    numpyro.sample("v", HiddenFactor(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


class NotNormalised(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1.0


@refused("observe", "v", "hidden factor")
def hidden_constant(S, u):
    numpyro.sample("v", NotNormalised(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


class HiddenWrapper(dist.Independent):
    def log_prob(self, value):
        return super().log_prob(value) - 0.1 * jnp.sum(self.base_dist.loc**2)


@refused("observe", "v", "hidden factor")
def hidden_factor_in_a_wrapper(S, u):
    numpyro.sample("v", HiddenWrapper(dist.Normal(S @ u["key"], 1.0), 1), obs=u["value"])  # here


@refused("observe", "v", "hidden factor")
def patched_density(S, u):
    noise = dist.Normal(S @ u["key"], 1.0).to_event(1)
    noise.log_prob = lambda value: -jnp.sum((value - S @ u["key"]) ** 2)
    numpyro.sample("v", noise, obs=u["value"])  # here


class ComplexDensity(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1j * self.loc


@refused("observe", "v", "complex", NotSupported)
def complex_density(S, u):
    numpyro.sample("v", ComplexDensity(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


# What automatic differentiation would not see.


@jax.custom_jvp
def doubled_derivative(x):
    return x


doubled_derivative.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@jax.custom_vjp
def doubled_cotangent(x):
    return x


doubled_cotangent.defvjp(lambda x: (x, None), lambda _, cotangent: (2 * cotangent,))


@refused("transition", "S", "stop_gradient")
def stopped_gradient(S, u):
    mean = lax.stop_gradient(u["decay"] * S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "custom derivative")
def custom_jvp(S, u):
    mean = doubled_derivative(S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "custom derivative")
def custom_vjp(S, u):
    mean = doubled_cotangent(S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("readout", "", "custom derivative")
def custom_readout(S, u):
    return doubled_derivative(S) @ u["query"]  # here


@refused("transition", "S", "Python callback")
def python_callback(S, u):
    mean = jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(S.shape, S.dtype), S)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "side effect")
def side_effect(S, u):
    jax.debug.callback(lambda memory: None, S)
    return decaying(S, u)


@refused("transition", "S", "mean is not affine")
def cast_to_integers(S, u):
    mean = S.astype(int)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("transition", "S", "mean is not affine")
def cast_to_bfloat16(S, u):
    mean = S.astype(jnp.bfloat16)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


# Python instead of JAX.


@refused("transition", "", "Python needs the value of a latent")
def python_if(S, u):
    if S[0, 0] > 0:  # here
        return S
    return decaying(S, u)


@refused("transition", "", "Python needs the value of a latent")
def python_float(S, u):
    return S * float(S[0, 0])  # here


@refused("transition", "", "Python needs the value of a latent")
def numpy_call(S, u):
    return jnp.asarray(np.asarray(S))  # here


@refused("transition", "", "Python needs the value of a latent")
def python_if_on_a_draw(S, u):
    S = decaying(S, u)
    return S if S[0, 0] > 0 else -S  # here


@refused("transition", "", "Python needs the value of an input", NotSupported)
def python_if_on_an_input(S, u):
    return S if u["decay"] > 0.5 else -S  # here


CALLS = {"count": 0}


@refused("transition", "", "when called again")
def counting_mean(S, u):
    CALLS["count"] += 1
    return numpyro.sample("S", dist.Normal(S * (1 + 0.01 * CALLS["count"]), 1.0).to_event(2))


@refused("transition", "", "when called again")
def counting_noise(S, u):
    CALLS["count"] += 1
    return numpyro.sample("S", dist.Normal(S, 1 + 0.01 * CALLS["count"]).to_event(2))


@refused("observe", "", "when called again")
def counting_reading(S, u):
    CALLS["count"] += 1
    mean = S @ u["key"] * (1 + 0.01 * CALLS["count"])
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("readout", "", "when called again")
def counting_readout(S, u):
    CALLS["count"] += 1
    return S @ u["query"] * (1 + 0.01 * CALLS["count"])


@refused("prior", "", "when called again")
def counting_prior():
    CALLS["count"] += 1
    scale = 1 + 0.01 * CALLS["count"]
    return numpyro.sample("S", dist.Normal(jnp.zeros((2, 2)), scale).to_event(2))


@refused("transition", "", "sites change", NotSupported)
def changing_sites(S, u):
    CALLS["count"] += 1
    return numpyro.sample(f"S{CALLS['count']}", dist.Normal(S, 1.0).to_event(2))


@refused("transition", "", "changes its arguments", NotSupported)
def input_replaced(S, u):
    u["value"] = S[0]
    return decaying(S, u)


def _memories(prior_of_b=0.0):
    return {
        "a": numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1)),
        "b": numpyro.sample("b", dist.Normal(prior_of_b, 1.0)),
    }


def _read_memories(S, u):
    return S["a"] * S["b"].shape[0] if S["b"].ndim else S["a"]


@refused(
    "observe",
    "",
    "changes its arguments",
    NotSupported,
    prior=_memories,
    transition=lambda S, u: S,
    readout=_read_memories,
)
def memory_replaced_by_observe(S, u):
    S["b"] = jnp.zeros(())
    numpyro.sample("v", dist.Normal(S["a"], 1.0).to_event(1), obs=u["value"])


HELD: dict[str, Any] = {}


def _hold(S, u):
    HELD["memory"] = S
    return decaying(S, u)


@refused("observe", "", "earlier call", NotSupported, transition=_hold)
def memory_smuggled_in_a_global(S, u):
    numpyro.sample("v", dist.Normal(HELD["memory"] @ u["key"], 1.0).to_event(1), obs=u["value"])


PAST: list[Any] = []


@refused("transition", "S", "earlier call", NotSupported)
def memory_of_an_earlier_call(S, u):
    PAST.append(S)
    return numpyro.sample("S", dist.Normal(PAST[-2:][0], 1.0).to_event(2))  # here


@refused("transition", "", "name must be the same", NotSupported)
def name_made_of_an_input(S, u):
    return numpyro.sample(f"S at {u['decay']}", dist.Normal(S, 1.0).to_event(2))


@refused("observe", "S", "shares its name", NotSupported)
def fixed_site_named_as_in_transition(S, u):
    numpyro.deterministic("S", S)  # here
    linear_reading(S, u)


@refused("observe", "v", "share one name", NotSupported)
def fixed_site_named_as_another(S, u):
    numpyro.deterministic("v", S)
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "", "Python needs the value of an input", NotSupported)
def plate_as_large_as_an_input(S, u):
    with numpyro.plate("rows", u["slot"]):  # here
        linear_reading(S, u)


# NumPyro beyond sample sites.


@refused("transition", "rate", "param", NotSupported)
def learned_parameter(S, u):
    return numpyro.sample("S", dist.Normal(numpyro.param("rate", 0.9) * S, 1.0).to_event(2))  # here


@refused("transition", "", "prng_key", NotSupported)
def own_random_key(S, u):
    return S + jax.random.normal(numpyro.prng_key(), S.shape)  # here


@refused("transition", "", "control flow", NotSupported)
def scan_over_sites(S, u):
    def step(memory, _):
        memory = numpyro.sample("S", dist.Normal(memory, 1.0).to_event(2))
        return memory, None

    return control_flow.scan(step, S, None, length=2)[0]  # here


@refused("transition", "", "control flow", NotSupported)
def cond_over_sites(S, u):
    def move(memory):
        return numpyro.sample("S", dist.Normal(memory, 1.0).to_event(2))

    return control_flow.cond(u["decay"] > 0.5, move, move, S)  # here


@refused("transition", "S", "share one name", NotSupported)
def two_sites_of_one_name(S, u):
    S = numpyro.sample("S", dist.Normal(S, 1.0).to_event(2))
    return numpyro.sample("S", dist.Normal(S, 1.0).to_event(2))  # here


@refused("observe", "S", "share", NotSupported)
def name_used_in_transition_too(S, u):
    numpyro.sample("S", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["value"])  # here


@refused("transition", "S", "substitute", NotSupported)
def substituted_site(S, u):
    with handlers.substitute(data={"S": S}):
        return numpyro.sample("S", dist.Normal(S, 1.0).to_event(2))  # here


@refused("prior", "z", "observed", NotSupported)
def observed_in_the_prior():
    S = normal_prior()
    numpyro.sample("z", dist.Normal(S[0, 0], 1.0), obs=0.3)  # here
    return S


@refused("readout", "y", "observed", NotSupported)
def observed_in_the_readout(S, u):
    numpyro.sample("y", dist.Normal(S @ u["query"], 1.0).to_event(1), obs=u["value"])  # here


@refused("observe", "v", "observed value depends on the memory")
def observed_value_of_memory(S, u):
    value = u["value"] - S @ u["key"]
    numpyro.sample("v", dist.Normal(jnp.zeros(2), 1.0).to_event(1), obs=value)  # here


@refused("observe", "v", "not finite", NotSupported)
def observed_value_nan(S, u):
    missing = jnp.full(2, jnp.nan)
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=missing)  # here


@refused("observe", "", "nothing is ever written", NotSupported)  # here
def nothing_observed(S, u):
    return S @ u["key"]


# Shapes and types.


@refused("observe", "", "raised TypeError", NotSupported)
def matrices_that_do_not_match(S, u):
    mean = S @ jnp.ones(3)  # here
    numpyro.sample("v", dist.Normal(mean, 1.0).to_event(1), obs=u["value"])


@refused("observe", "v", "obs is a list", NotSupported)
def observed_list(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=[0.3, -1.0])  # here


@refused("observe", "v", "obs has shape", NotSupported)
def observation_too_wide(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=jnp.ones(3))  # here


@refused("observe", "v", "obs has shape", NotSupported)
def observation_broadcast(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["decay"])  # here


@refused("observe", "v", "obs has shape", NotSupported)
def observation_repeated(S, u):
    numpyro.sample("v", dist.Normal(S[0, 0], 1.0), obs=u["value"])  # here


@refused("transition", "", "return the next memory", NotSupported)  # here
def returns_another_shape(S, u):
    return decaying(S, u)[0]


@refused("transition", "", "return the next memory", NotSupported)  # here
def returns_nothing(S, u):
    decaying(S, u)


@refused("transition", "", "return the next memory", NotSupported)  # here
def returns_a_pair(S, u):
    return S, S


@refused("transition", "", "complex", NotSupported)  # here
def returns_complex(S, u):
    return decaying(S, u) * (1 + 1j)


@refused("observe", "v", "complex", NotSupported)
def complex_mean(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"] * 1j, 1.0).to_event(1), obs=u["value"])  # here


@refused("readout", "", "complex", NotSupported)  # here
def complex_readout(S, u):
    return S @ u["query"] * 1j


@refused("prior", "", "return the memory", NotSupported)  # here
def prior_returns_nothing():
    normal_prior()


@refused("prior", "", "real numbers", NotSupported)  # here
def prior_returns_integers():
    return jnp.zeros((2, 2), int)


@refused("prior", "", "no entries", NotSupported)  # here
def prior_returns_no_entries():
    return jnp.zeros((0, 2))


@refused("transition", "", "real numbers", NotSupported)  # here
def returns_integers(S, u):
    return jnp.ones((2, 2), int)  # which a later `S.at[0].set(0.5)` would round


@refused(
    "transition",
    "S",
    "rounding",
    prior=lambda: jnp.ones((2, 2), jnp.float32),
)
def rounding_to_the_type_of_the_prior(S, u):
    mean = S.astype(jnp.float32)  # here
    return numpyro.sample("S", dist.Normal(mean, 1.0).to_event(2))


@refused("readout", "", "return the output", NotSupported)  # here
def readout_of_no_arrays(S, u):
    return ()


@refused("prior", "", "real numbers", NotSupported)  # here
def prior_returns_complex():
    return normal_prior() + 1j


@refused("prior", "", "real numbers", NotSupported)  # here
def prior_returns_booleans():
    return jnp.zeros((2, 2), bool)


@pytest.mark.parametrize("name", REFUSED)
def test_model_is_refused_by_function_site_reason_and_line(name):
    case = REFUSED[name]
    with pytest.raises(NotLinearGaussian) as caught:
        derive(case.model, draw_inputs())
    error = caught.value
    assert (error.function, error.site) == (case.function, case.site)
    assert case.words in error.reason
    assert type(error) is case.kind
    assert error.location.startswith(case.location or __file__) or not case.location


# The user's own errors, which say nothing about the model.


def _own_errors(S, u):
    raise ValueError("no such gate")


def _own_type_error(S, u):
    return S + len(3)


def _own_assertion(S, u):
    assert S.shape == (7, 7), "not seven"


def _own_runtime_error(S, u):
    raise RuntimeError("no luck")


@pytest.mark.parametrize("role", ["transition", "observe", "readout"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_own_errors, "raised ValueError: no such gate"),
        (_own_type_error, "raised TypeError: object of type 'int'"),
        (_own_assertion, "raised AssertionError: not seven"),
        (_own_runtime_error, "raised RuntimeError: no luck"),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "defaults"])
def test_an_error_of_the_users_own_is_no_refusal(role, fault, words, given):
    with pytest.raises(ModelError) as caught:
        derive(replace(BASE, **{role: fault}), draw_inputs() if given else None)
    line = fault.__code__.co_firstlineno + 1
    assert f"`{role}` {words}" in str(caught.value)
    assert f"({__file__}:{line} ({fault.__name__}))" in str(caught.value)


def _if_before_another_input(S, u):
    if u["decay"] > 0.5:
        return S * u["drift"]
    return S


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "defaults"])
def test_an_if_on_an_input_is_refused_whatever_inputs_are_read_after_it(given):
    inputs = {n: a for n, a in draw_inputs().items() if n != "drift"} if given else None
    with pytest.raises(NotSupported) as caught:
        derive(replace(BASE, transition=_if_before_another_input), inputs)
    assert "Python needs the value of an input" in caught.value.reason
    line = _if_before_another_input.__code__.co_firstlineno + 1
    assert caught.value.location.startswith(f"{__file__}:{line} (")


@dataclass
class _Gate:
    value: Any


def test_a_location_is_no_generated_method():
    def transition(S, u):
        return _Gate(u["decay"], 3)

    with pytest.raises(ModelError, match=f"raised TypeError.*{__file__}"):
        derive(replace(BASE, transition=transition), draw_inputs())


# What must be accepted.

TABLE = np.array([[1.0, 0.3], [0.3, 2.0]])  # jnp, before float64 is on, would make float32


@accepted("observe")
def base(S, u):
    linear_reading(S, u)


@accepted("observe")
def what_observe_returns_is_ignored(S, u):
    linear_reading(S, u)
    return jnp.tanh(S), "read"


@accepted("observe")
def plate_of_rows(S, u):
    with numpyro.plate("rows", 2):
        numpyro.sample("v", dist.Normal(S @ u["key"], u["noise"]), obs=u["value"])


@accepted("transition")
def nested_plates(S, u):
    with numpyro.plate("rows", 2, dim=-2), numpyro.plate("keys", 2, dim=-1):
        return numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]))


@accepted("transition")
def plate_that_expands(S, u):
    with numpyro.plate("keys", 2):
        shift = numpyro.sample("shift", dist.Normal(0.0, u["drift"]))
    return S + shift


@accepted("transition")
def delta_in_a_plate(S, u):
    with numpyro.plate("keys", 2):
        shift = numpyro.sample("shift", dist.Delta(0.5))
    return numpyro.sample("S", dist.Normal(S + jnp.sum(shift), 1.0).to_event(2))


@accepted("transition")
def sample_shape(S, u):
    noise = numpyro.sample("e", dist.Normal(0.0, u["drift"]), sample_shape=(2, 2))
    return u["decay"] * S + noise


@accepted("transition")
def sample_shape_of_vectors(S, u):
    noise = numpyro.sample("e", dist.MultivariateNormal(jnp.ones(2), TABLE), sample_shape=(2,))
    return u["decay"] * S + noise


@accepted("prior")
def matrix_normal():
    factor = jnp.array([[1.0, 0.0], [0.5, 0.8]])
    return numpyro.sample("S", dist.MatrixNormal(jnp.ones((2, 2)), 1.1 * jnp.eye(2), factor))


@accepted("prior")
def rows_with_one_covariance():
    rows = dist.MultivariateNormal(jnp.zeros(2), covariance_matrix=TABLE)
    return numpyro.sample("S", rows.expand([2]).to_event(1))


@accepted("prior")
def rows_with_own_covariances():
    covariances = jnp.stack([TABLE, 2 * jnp.eye(2)])
    return numpyro.sample("S", dist.MultivariateNormal(jnp.ones((2, 2)), covariances).to_event(1))


@accepted("prior")
def precision_matrix():
    rows = dist.MultivariateNormal(jnp.ones((2, 2)), precision_matrix=TABLE)
    return numpyro.sample("S", rows.to_event(1))


@accepted("prior")
def low_rank_covariance():
    rows = dist.LowRankMultivariateNormal(
        jnp.ones((2, 2)), cov_factor=jnp.array([[1.0], [0.4]]), cov_diag=jnp.array([0.5, 0.7])
    )
    return numpyro.sample("S", rows.to_event(1))


@accepted("prior")
def dependent_rows():
    flat = dist.MultivariateNormal(jnp.arange(4.0), 0.5 * jnp.eye(4) + 0.2)
    return numpyro.sample("S", flat).reshape(2, 2)


@accepted("prior")
def random_walk_over_keys():
    return numpyro.sample("S", dist.GaussianRandomWalk(0.7, num_steps=2).expand([2]).to_event(1))


@accepted("prior")
def state_space_over_keys():
    walk = dist.GaussianStateSpace(2, jnp.array([[0.9]]), scale_tril=jnp.array([[0.7]]))
    return numpyro.sample("S", walk.expand([2]).to_event(1))[..., 0]


@accepted("prior")
def conditional_autoregression():
    adjacency = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    return numpyro.sample("S", dist.CAR(jnp.zeros((2, 2)), 0.4, 1.3, adjacency).to_event(1))


@accepted("prior")
def circulant_normal():
    rows = dist.CirculantNormal(jnp.zeros((2, 2)), covariance_row=jnp.array([1.0, 0.3]))
    return numpyro.sample("S", rows.to_event(1))


@accepted("prior")
def affine_transform_of_a_normal():
    shifted = dist.TransformedDistribution(
        dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2),
        transforms.AffineTransform(0.5, jnp.array([2.0, -3.0])),
    )
    return numpyro.sample("S", shifted)


@accepted("prior")
def lower_cholesky_transform_of_a_normal():
    mixed = dist.TransformedDistribution(
        dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(1),
        transforms.LowerCholeskyAffine(jnp.ones(2), jnp.array([[1.0, 0.0], [0.5, 0.8]])),
    )
    return numpyro.sample("S", mixed.to_event(1))


class LyingMean(dist.Normal):
    """A Normal whose mean and sampler are wrong; its log density is a Normal's."""

    @property
    def mean(self):
        return self.loc + 1

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape + self.shape())


@accepted("transition")
def density_of_a_normal_that_lies_about_its_mean(S, u):
    return numpyro.sample("S", LyingMean(u["decay"] * S, u["drift"]).to_event(2))


@accepted("observe")
def validated_arguments(S, u):
    noise = dist.Normal(S @ u["key"], u["noise"], validate_args=True).to_event(1)
    numpyro.sample("v", noise, obs=u["value"])


@accepted("observe")
def noise_with_covariance(S, u):
    numpyro.sample("v", dist.MultivariateNormal(S @ u["key"], u["noise"] * TABLE), obs=u["value"])


@accepted("observe")
def noise_with_precision(S, u):
    noise = dist.MultivariateNormal(S @ u["key"], precision_matrix=u["noise"] * TABLE)
    numpyro.sample("v", noise, obs=u["value"])


@accepted("observe")
def noise_with_factor(S, u):
    factor = u["noise"] * jnp.array([[1.0, 0.0], [0.5, 0.8]])
    noise = dist.MultivariateNormal(S @ u["key"], scale_tril=factor)
    numpyro.sample("v", noise, obs=u["value"])


@accepted("transition")
def noncentred(S, u):
    noise = numpyro.sample("e", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    return numpyro.deterministic("S", u["decay"] * S + u["drift"] * noise)


@accepted("transition")
def no_noise(S, u):
    return u["decay"] * S * jnp.exp(-u["drift"])


@accepted("transition")
def delta_of_memory(S, u):
    return numpyro.sample("S", dist.Delta(0.9 * S).to_event(2))


@accepted("transition")
def constant_memory(S, u):
    return jnp.zeros_like(S) + numpyro.sample("e", dist.Normal(0, u["drift"]).expand([2, 2]))


@accepted("transition")
def householder(S, u):
    reflection = jnp.eye(2) - u["drift"] * jnp.outer(u["key"], u["key"])
    return numpyro.sample("S", dist.Normal(S @ reflection, u["drift"]).to_event(2))


@accepted("transition")
def shared_shift(S, u):
    shift = numpyro.sample("shift", dist.Normal(0.3, 1.0))
    return numpyro.sample("S", dist.Normal(u["decay"] * S + shift, 0.5).to_event(2))


@accepted("transition")
def where_on_input(S, u):
    mean = jnp.where(u["decay"] > 0.7, u["decay"] * S, S + 1)
    return numpyro.sample("S", dist.Normal(mean, 0.5).to_event(2))


@accepted("transition")
def cond_on_input(S, u):
    mean = lax.cond(u["decay"] > 0.7, lambda S: 0.5 * S, lambda S: S.T, S)
    return numpyro.sample("S", dist.Normal(mean, 0.5).to_event(2))


@accepted("transition")
def loops_from_jax(S, u):
    turned = lax.fori_loop(0, 3, lambda _, memory: memory @ jnp.array([[0.8, -0.6], [0.6, 0.8]]), S)
    summed, _ = lax.scan(lambda total, row: (total + row, None), jnp.zeros(2), turned)
    mean = jax.vmap(lambda row: u["decay"] * row + 0.1 * summed)(turned)
    return numpyro.sample("S", dist.Normal(mean, 0.5).to_event(2))


@accepted("transition")
def indexed_by_an_integer_input(S, u):
    cleared = S.at[:, u["slot"]].set(0.2 * u["value"])
    return numpyro.sample("S", dist.Normal(cleared, 0.5).to_event(2))


@accepted("transition")
def linear_solve(S, u):
    mean = jnp.linalg.solve(TABLE + jnp.outer(u["key"], u["key"]), S.T).T
    return numpyro.sample("S", dist.Normal(mean, 0.5).to_event(2))


@accepted("transition")
def observed_change(S, u):
    change = numpyro.sample("change", dist.Normal(0.1 * S, u["drift"]).to_event(2))
    numpyro.sample("seen", dist.Normal(change @ u["key"], 0.3).to_event(1), obs=u["value"])
    return u["decay"] * S + change


@accepted("transition")
def observed_value_reused(S, u):
    seen = numpyro.sample("seen", dist.Normal(S @ u["key"], 0.3).to_event(1), obs=u["value"])
    return numpyro.sample("S", dist.Normal(0.5 * S + seen[:, None], 0.4).to_event(2))


@accepted("transition", observe=lambda S, u: None)
def observed_in_the_transition_only(S, u):
    S = numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]).to_event(2))
    numpyro.sample("seen", dist.Normal(S @ u["key"], 0.3).to_event(1), obs=u["value"])
    return S


@accepted("observe")
def whole_memory_observed(S, u):
    seen = jnp.outer(u["value"], u["key"])
    numpyro.sample("Z", dist.Normal(S, u["noise"]).to_event(2), obs=seen)


@accepted("observe")
def several_observations(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], 1.0).to_event(1), obs=u["value"])
    numpyro.sample("w", dist.Normal(jnp.sum(S), u["noise"]), obs=u["value"][0])


@accepted("observe")
def shared_error(S, u):
    error = numpyro.sample("error", dist.Normal(0.2, u["noise"]))
    numpyro.sample("v", dist.Normal(S @ u["key"] + error, 0.5).to_event(1), obs=u["value"])


@accepted("observe")
def observation_of_noise_alone(S, u):
    linear_reading(S, u)
    numpyro.sample("w", dist.Normal(0.0, u["noise"]), obs=u["value"][0])


@accepted("observe")
def rows_with_own_noise(S, u):
    scale = u["noise"] * jnp.array([1.0, 2.0])
    numpyro.sample("v", dist.Normal(S @ u["key"], scale).to_event(1), obs=u["value"])


@accepted("observe")
def row_addressed_by_an_input(S, u):
    numpyro.sample("v", dist.Normal(S[u["slot"]], u["noise"]).to_event(1), obs=u["value"])


@accepted("transition")
def noncentred_by_reparametrisation(S, u):
    with handlers.reparam(config={"S": reparam.LocScaleReparam(centered=0)}):
        return numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]).to_event(2))


@accepted("transition")
def transformed_by_reparametrisation(S, u):
    with handlers.reparam(config={"S": reparam.TransformReparam()}):
        shifted = dist.TransformedDistribution(
            dist.Normal(S, 1.0), transforms.AffineTransform(0.1, u["drift"])
        )
        return numpyro.sample("S", shifted.to_event(2))


@accepted("transition")
def conditioned_site(S, u):
    def move(S):
        change = numpyro.sample("change", dist.Normal(S @ u["key"], 1.0).to_event(1))
        return numpyro.sample("S", dist.Normal(S + change[:, None], 1.0).to_event(2))

    return handlers.condition(move, data={"change": u["value"]})(S)


@accepted("transition")
def intervened_site(S, u):
    def move(S):
        change = numpyro.sample("change", dist.Normal(S @ u["key"], 1.0).to_event(1))
        return numpyro.sample("S", dist.Normal(S + change[:, None], 1.0).to_event(2))

    return handlers.do(move, data={"change": u["value"]})(S)


@accepted("transition")
def hidden_observation(S, u):
    with handlers.block(hide=["seen"]):
        numpyro.sample("seen", dist.Normal(S @ u["key"], 0.3).to_event(1), obs=u["value"])
        return decaying(S, u)


@accepted("readout")
def noisy_readout(S, u):
    numpyro.sample("y", dist.Normal(S @ u["query"] + 1, 0.3).to_event(1))


def _vector_prior():
    return numpyro.sample("S", dist.Normal(jnp.zeros(2), 1.3).to_event(1))


def _vector_reading(S, u):
    numpyro.sample("v", dist.Normal(S @ u["key"], u["noise"]), obs=u["value"][0])


@accepted("transition", prior=_vector_prior, observe=_vector_reading)
def memory_of_one_row(S, u):
    return numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]).to_event(1))


def _scalar_prior():
    return numpyro.sample("S", dist.Normal(0.0, 1.3))


def _scalar_reading(S, u):
    numpyro.sample("v", dist.Normal(S, u["noise"]), obs=u["value"][0])


@accepted("transition", prior=_scalar_prior, observe=_scalar_reading, readout=lambda S, u: S)
def memory_of_one_number(S, u):
    return numpyro.sample("S", dist.Normal(u["decay"] * S, u["drift"]))


def _read_both(S, u):
    mean = S["b"] + S["a"] @ u["key"]
    numpyro.sample("v", dist.Normal(mean, u["noise"]), obs=u["value"][0])


@accepted("transition", prior=_memories, observe=_read_both, readout=lambda S, u: S["b"])
def memory_of_named_parts(S, u):
    moved = numpyro.sample("a", dist.Normal(u["decay"] * S["a"], u["drift"]).to_event(1))
    return {"a": moved, "b": S["b"] + 0.1 * S["a"][0]}


def _level_and_slope():
    return (
        numpyro.sample("level", dist.Normal(0.0, 1.0)),
        numpyro.sample("slope", dist.Normal(0.0, 1.0)),
    )


def _read_level(S, u):
    numpyro.sample("v", dist.Normal(S[0], u["noise"]), obs=u["value"][0])


@accepted("transition", prior=_level_and_slope, observe=_read_level, readout=lambda S, u: S[0])
def local_linear_trend(S, u):
    level, slope = S
    return level + slope, numpyro.sample("slope", dist.Normal(slope, u["drift"]))


@accepted("prior")
def known_memory():
    return jnp.ones((2, 2))


@accepted("prior")
def memory_of_rank_one():
    scale = numpyro.sample("scale", dist.Normal(0.0, 1.0))
    return scale * jnp.outer(jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0]))


@pytest.mark.parametrize("name", ACCEPTED)
def test_model_is_accepted_and_its_filter_conditions_the_joint_density(name):
    model, inputs = ACCEPTED[name], draw_inputs()
    expected = condition_densely(model, inputs)
    assert_filter_conditions_densely(draft(model, inputs), inputs, expected)


def test_covariance_in_float32_rounds_the_density_of_numpyro_and_not_the_filter():
    """NumPyro sums the normaliser of a float32 covariance in float32; we factor it in float64."""

    def prior(covariance):
        rows = dist.MultivariateNormal(jnp.zeros(2), covariance).expand([2])
        return numpyro.sample("S", rows.to_event(1))

    inputs, rounded = draw_inputs(), jnp.asarray(TABLE, jnp.float32)
    model = replace(BASE, prior=lambda: prior(rounded))
    expected = condition_densely(model, inputs)
    exact = derive(model, inputs)
    assert_filter_conditions_densely(exact, inputs, expected, tolerance=1e-6)
    # The float32 factor, taken for a number of float64, is the same model without rounding.
    factor = jnp.linalg.cholesky(rounded).astype(float)
    wide = replace(BASE, prior=lambda: prior(factor @ factor.T))
    assert_filter_conditions_densely(exact, inputs, condition_densely(wide, inputs))
