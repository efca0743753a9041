"""Random design models: the verdict of `derive` against the joint density, only evaluated.

A model is made of parts. Good parts keep it linear-Gaussian and are supported; strange ones must
be refused wherever they stand. Whatever is accepted is quadratic along random lines, near and
far, and its filter conditions the density.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from dense_conditioning import (
    assert_filter_conditions_densely,
    departure_from_quadratic,
    joint_density,
    posterior_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer.reparam import LocScaleReparam

from design_models import DesignModel
from inference import NotLinearGaussian, derive

MATRIX = np.array([[0.9, 0.3], [-0.2, 0.7]])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.8]])
WIDTH, STEPS = 2, 2
VISIBLE = 1e-6
"""Relative third difference that rounding does not make; quadratics stay below 1e-9."""


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.custom_jvp
def own_derivative(x):
    return x


own_derivative.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

# Maps of a vector x of the memory or of what was made of it; `y` is another such vector.
AFFINE = {
    "decay": lambda x, y, u: u["decay"] * x,
    "shift": lambda x, y, u: x + u["value"],
    "mix": lambda x, y, u: jnp.asarray(MATRIX) @ x,
    "add": lambda x, y, u: 0.5 * (x + y),
    "reverse": lambda x, y, u: x[::-1],
    "erase": lambda x, y, u: x - u["key"] * (u["key"] @ x),
    "where input": lambda x, y, u: jnp.where(u["decay"] > 0.7, x, y),
    "cond input": lambda x, y, u: lax.cond(u["noise"] > 0.3, lambda: x, lambda: 2 * y),
    "scan": lambda x, y, u: lax.scan(lambda a, b: (0.5 * a + b, a), u["noise"], x)[1],
    "vmap jit": lambda x, y, u: jax.vmap(jax.jit(lambda a, b: a - 0.3 * b))(x, y),
    "solve": lambda x, y, u: jnp.linalg.solve(MATRIX + jnp.outer(u["key"], u["key"]), x),
    "set slot": lambda x, y, u: x.at[u["slot"]].set(y[0]),
    "take slot": lambda x, y, u: x[u["slot"]] + y,
    "guard": lambda x, y, u: jnp.where(jnp.isnan(x), 0.0, x),
    "complex": lambda x, y, u: jnp.real((1 + 1j) * x),
    "remat": lambda x, y, u: jax.checkpoint(lambda a: a * u["key"])(x),
    "stopped input": lambda x, y, u: lax.stop_gradient(u["key"]) * x,
}
NOT_AFFINE = {
    "tanh": lambda x, y, u: jnp.tanh(x),
    "abs": lambda x, y, u: jnp.abs(x),
    "clip": lambda x, y, u: jnp.clip(x, -1e3, 1e3),
    "relu": lambda x, y, u: jnp.where(x > 0, x, 0.0),
    "product": lambda x, y, u: x * y,
    "square in scan": lambda x, y, u: lax.scan(lambda a, b: (a * b, a), 1.0, x)[1],
    "branch": lambda x, y, u: lax.cond(x[0] > 0, lambda: x, lambda: 2 * y + 1),
    "only at some inputs": lambda x, y, u: jnp.where(u["noise"] > 9.0, jnp.sin(x), x),
    "stop_gradient": lambda x, y, u: lax.stop_gradient(x),
    "custom_jvp": lambda x, y, u: own_derivative(x),
    "single": lambda x, y, u: x.astype(jnp.float32).astype(float),
    "norm": lambda x, y, u: x / (1 + jnp.linalg.norm(y)),
    "argmax": lambda x, y, u: jnp.roll(x, jnp.argmax(y)),
}
MAPS = AFFINE | NOT_AFFINE


def affine_transform(mean, scale):
    base = dist.Normal(jnp.zeros(WIDTH), 1.0)
    return dist.TransformedDistribution(base, transforms.AffineTransform(mean, scale)).to_event(1)


def cholesky_transform(mean, scale):
    base, factor = dist.Normal(0.0, 1.0).expand([WIDTH]).to_event(1), np.linalg.cholesky(COVARIANCE)
    return dist.TransformedDistribution(base, transforms.LowerCholeskyAffine(mean, scale * factor))


# Laws of a site with a mean and a scale that is made of inputs.
GAUSSIAN = {
    "normal": lambda m, s: dist.Normal(m, s).to_event(1),
    "covariance": lambda m, s: dist.MultivariateNormal(m, s * COVARIANCE),
    "precision": lambda m, s: dist.MultivariateNormal(m, precision_matrix=COVARIANCE / s),
    "factor": lambda m, s: dist.MultivariateNormal(m, scale_tril=s * np.tril(COVARIANCE)),
    "affine": affine_transform,
    "cholesky": cholesky_transform,
}
NOT_GAUSSIAN = {
    "student": lambda m, s: dist.StudentT(30.0, m, s).to_event(1),
    "laplace": lambda m, s: dist.Laplace(m, s).to_event(1),
    "scale of a latent": lambda m, s: dist.Normal(m, s * jnp.exp(0.1 * m[0])).to_event(1),
    "half normal": lambda m, s: dist.HalfNormal(s).expand([WIDTH]).to_event(1),
    "sinh": lambda m, s: dist.TransformedDistribution(
        dist.Normal(m, s), transforms.SoftplusTransform()
    ).to_event(1),
    "mask": lambda m, s: dist.Normal(m, s).mask(np.arange(WIDTH) > 0).to_event(1),
    "negative": lambda m, s: dist.Normal(m, -s).to_event(1),
    "nan": lambda m, s: dist.Normal(m, s * jnp.nan).to_event(1),
    "poisson": lambda m, s: dist.Poisson(s).expand([WIDTH]).to_event(1),
}
LAWS = GAUSSIAN | NOT_GAUSSIAN
STYLES = ("plain", "plate", "noncentred", "reparametrised", "shared error", "nested")
WEIGHTS = {
    "factor": lambda m: numpyro.factor("extra", -jnp.sum(m**2)),
    "weighted delta": lambda m: numpyro.sample(
        "extra", dist.Delta(m, log_density=-(m**2)).to_event(1)
    ),
    "subsample": lambda m: numpyro.plate("extra", 2, subsample_size=1).__enter__(),
}
HANDLERS = {
    "scale": lambda: handlers.scale(scale=2.0),
    "mask": lambda: handlers.mask(mask=jnp.array(False)),
}


class Part(NamedTuple):
    """One function: maps of the memory, then a site; `strange` is a weight or a handler, or ""."""

    maps: tuple[str, ...]
    law: str
    style: str
    strange: str = ""

    def mean(self, x, u):
        results = [x]
        for i, name in enumerate(self.maps):
            results.append(MAPS[name](results[-1], results[i // 2], u))
        return results[-1]

    def sample(self, name, mean, scale, obs=None):
        if self.strange in WEIGHTS:
            WEIGHTS[self.strange](mean)
        with HANDLERS.get(self.strange, contextlib.nullcontext)():
            return self._styled(name, mean, scale, obs)

    def _styled(self, name, mean, scale, obs):
        if self.style == "shared error":
            mean = mean + numpyro.sample(f"{name}_error", dist.Normal(0.1, scale))
        if self.law not in ("normal", *NOT_GAUSSIAN):
            return numpyro.sample(name, LAWS[self.law](mean, scale), obs=obs)
        if self.law == "normal" and self.style == "plate":
            with numpyro.plate(f"{name}_plate", WIDTH):
                return numpyro.sample(name, dist.Normal(mean, scale), obs=obs)
        if self.law == "normal" and self.style == "noncentred" and obs is None:
            noise = numpyro.sample(f"{name}_noise", dist.Normal(0, 1).expand([WIDTH]).to_event(1))
            return numpyro.deterministic(name, mean + scale * noise)
        reparametrised = self.style == "reparametrised" and self.law == "normal" and obs is None
        config = {name: LocScaleReparam(0.0)} if reparametrised else {}
        with handlers.reparam(config=config):
            return numpyro.sample(name, LAWS[self.law](mean, scale), obs=obs)


class Program(NamedTuple):
    prior: Part
    transition: Part
    observe: Part
    readout: Part

    @property
    def strange(self) -> bool:
        return any(
            part.strange or part.law in NOT_GAUSSIAN or any(m in NOT_AFFINE for m in part.maps)
            for part in self
        )

    def model(self) -> DesignModel:
        constant = {name: array[0] for name, array in draw_inputs(9).items()}

        def prior():
            start = jnp.zeros(WIDTH) + numpyro.sample("start", dist.Normal(0.2, 0.5))
            return self.prior.sample("S", self.prior.mean(start, constant), 1.1)

        def transition(memory, u):
            return self.transition.sample("S", self.transition.mean(memory, u), u["drift"])

        def observe(memory, u):
            self.observe.sample("v", self.observe.mean(memory, u), u["noise"], u["value"])

        def readout(memory, u):
            mean = self.readout.mean(memory, u)
            return mean if self.readout.law == "normal" else self.readout.sample("y", mean, 0.5)

        return DesignModel(prior, transition, observe, readout)


def draw_inputs(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    drawn = {
        "key": rng.normal(size=(STEPS, WIDTH)),
        "value": rng.normal(size=(STEPS, WIDTH)),
        "decay": rng.uniform(0.5, 1, STEPS),
        "drift": rng.uniform(0.1, 0.5, STEPS),
        "noise": rng.uniform(0.1, 0.5, STEPS),
        "slot": rng.integers(0, WIDTH, STEPS),
    }
    return {name: jnp.asarray(array) for name, array in drawn.items()}


def parts(maps=AFFINE):
    chosen = st.lists(st.sampled_from(sorted(maps)), max_size=3).map(tuple)
    return st.builds(
        Part, chosen, st.sampled_from(sorted(GAUSSIAN)), st.sampled_from(STYLES), st.just("")
    )


good_programs = st.builds(Program, parts(), parts(), parts(), parts())


@st.composite
def strange_programs(draw):
    program, role = draw(good_programs), draw(st.sampled_from(Program._fields))
    part = getattr(program, role)
    choices = [("law", name) for name in NOT_GAUSSIAN] + [("maps", name) for name in NOT_AFFINE]
    choices += [("strange", name) for name in (*WEIGHTS, *HANDLERS)]
    kind, name = draw(st.sampled_from(choices))
    if kind == "maps":
        part = part._replace(maps=(name, *(m for m in part.maps if "slot" not in m)))
    elif kind == "law":
        part = part._replace(law=name, style="plain")
    else:
        part = part._replace(strange=name, law="affine" if role == "readout" else part.law)
    return program._replace(**{role: part})


def assert_quadratic_and_filtered_exactly(exact, model, inputs):
    joint = joint_density(model, inputs)
    for scale in (1.0, 1e3):
        assert departure_from_quadratic(joint, 0, scale) < VISIBLE
    assert_filter_conditions_densely(exact, inputs, posterior_of(joint), tolerance=1e-7)


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(good_programs, st.integers(0, 2**16))
def test_program_of_supported_parts_is_accepted_and_filtered_exactly(program, seed):
    model, inputs = program.model(), draw_inputs(seed)
    assert_quadratic_and_filtered_exactly(derive(model, inputs), model, inputs)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(strange_programs(), st.integers(0, 2**16))
def test_program_with_one_strange_part_is_refused_with_a_reason(program, seed):
    assert program.strange
    with pytest.raises(NotLinearGaussian) as caught:
        derive(program.model(), draw_inputs(seed))
    assert caught.value.reason
    assert caught.value.function in Program._fields


@pytest.mark.parametrize("name", ["tanh", "abs", "product", "branch"])
def test_finite_differences_see_a_density_that_is_not_quadratic(name):
    part = Part((), "normal", "plain")
    program = Program(part, Part((name,), "normal", "plain"), part, part)
    assert departure_from_quadratic(joint_density(program.model(), draw_inputs(0)), 0, 3.0) > 1e-3
