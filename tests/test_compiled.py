"""Compiled filters are the exact ones they were compiled from, or are refused with a reason."""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from design_models import CATALOGUE, DesignModel, Diagonal, Exact, Forget, Isotropic
from inference import derive
from inference.certificate import Certificate
from inference.derivation import draft
from inference.kinship import Kinship
from inference.oracles import joint, nuts, simulation
from inference.oracles.check import Check
from layers import compile_filter
from layers.coefficients import why_not
from layers.compiled import GeneralMemory, RegressionMemory

STEPS = 9
CHUNKS = 70
"""More than one chunk."""

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def float64(request):
    """Float64, but for tests of float32."""
    with jax.enable_x64("float32" not in request.node.name):
        yield


EXACT = Exact()


def certify(exact, policy=EXACT):
    """A certificate of which every oracle approves, unasked."""
    checks = tuple(
        Check(oracle, "mean", 0.0, 1.0, "relative error")
        for oracle in (joint.ORACLE, nuts.ORACLE, simulation.ORACLE)
    )
    kinship = Kinship((), (), ())
    return Certificate(
        "test", policy, exact.structure, (), kinship, checks, None, 0, 4, (), 0.0, {}, exact
    )


@cache
def derived(name):
    """The filter of a catalogue entry or of a model below, and why it is not a fast one."""
    exact = derive(CATALOGUE[name].model() if name in CATALOGUE else OUTSIDE[name][0])
    return exact, why_not(exact)


def decode(memory, u):
    """All tokens, one by one."""
    return jax.lax.scan(lambda s, u: memory.step(u, s)[::-1], memory.init_state(), u)[1]


def assert_is(prediction, filtered):
    """A prediction is what the exact filter says."""
    variance = prediction.variance
    if variance.ndim == 1:
        variance = jnp.broadcast_to(variance[:, None], filtered.output_variances.shape)
    for ours, theirs in (
        (prediction.mean, filtered.outputs),
        (variance, filtered.output_variances),
        (prediction.log_evidence, filtered.log_evidence),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def assert_compile_to(exact, policy, u, *compiled):
    """These memories, and the first one step by step, are the filter."""

    @jax.jit
    def everything(u):
        runs = [memory(u, memory.init_state())[0] for memory in compiled]
        return exact.run(u, policy=policy), runs, [decode(compiled[0], u)]

    filtered, runs, decoded = everything(u)
    for prediction in runs + decoded:
        assert_is(prediction, filtered)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_compiled_recurrence_is_its_filter(name):
    entry = CATALOGUE[name]
    exact, why = derived(name)
    assert bool(why) == (exact.structure.kind != "shared rows")
    compiled = [compile_filter(certify(exact, entry.policy))]
    assert isinstance(compiled[0], GeneralMemory if why else RegressionMemory)
    if name in ("gla", "kalman_linear_attention"):
        compiled.append(GeneralMemory(exact, entry.policy, "parallel", why))
    if name in ("deltaproduct", "mesanet"):
        compiled.append(RegressionMemory(exact, entry.policy, "parallel"))
    u = entry.model().draw_inputs(jax.random.key(1), STEPS)
    assert_compile_to(exact, entry.policy, u, *compiled)


def test_every_form_of_the_bayesian_layer_is_its_filter():
    exact, _ = derived("bayesian_layer")
    fast = [RegressionMemory(exact, Exact(), a) for a in ("token", "chunked", "parallel")]
    u = exact.model.draw_inputs(jax.random.key(1), CHUNKS)
    assert_compile_to(exact, Exact(), u, *fast)
    general = [GeneralMemory(exact, Exact(), a, "") for a in ("token", "parallel")]
    assert_compile_to(exact, Exact(), {name: part[:STEPS] for name, part in u.items()}, *general)


@pytest.mark.parametrize("name", ["deltaproduct", "mesanet", "kalman_delta_diagonal"])
def test_the_general_form_follows_every_policy(name):
    exact, policy = derived(name)[0], CATALOGUE[name].policy
    u = exact.model.draw_inputs(jax.random.key(1), STEPS)
    assert_compile_to(exact, policy, u, GeneralMemory(exact, policy, "token", ""))


# -- models outside the catalogue -----------------------------------------------------------------

VALUE_WIDTH, KEY_WIDTH = 3, 2


def prior():
    mean = jnp.zeros((VALUE_WIDTH, KEY_WIDTH))
    return numpyro.sample("memory", dist.Normal(mean, 1.0).to_event(2))


def transition(memory, u):
    moved = memory * u["decay"]
    return numpyro.sample("memory", dist.Normal(moved, jnp.sqrt(u["drift"])).to_event(2))


def observe(memory, u):
    value = memory @ u["key"]
    numpyro.sample("value", dist.Normal(value, jnp.sqrt(u["noise"])).to_event(1), obs=u["value"])


def rotate(memory, u):
    cos, sin = jnp.cos(u["decay"]), jnp.sin(u["decay"])
    return transition(memory @ jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])]), u)


def read_noisily(memory, u):
    scale = jnp.sqrt(u["output_noise"])
    return numpyro.sample("output", dist.Normal(memory @ u["query"], scale).to_event(1))


def read_twice(memory, u):
    return jnp.concatenate([memory @ u["query"], memory @ u["key"]])


COVARIANCE = jnp.array([[1.0, 0.4], [0.4, 0.7]])


def correlated_prior():
    mean = jnp.zeros((VALUE_WIDTH, KEY_WIDTH))
    return numpyro.sample("memory", dist.MultivariateNormal(mean, COVARIANCE).to_event(1))


def uneven_prior():
    mean = jnp.zeros((VALUE_WIDTH, KEY_WIDTH))
    return numpyro.sample("memory", dist.Normal(mean, jnp.array([1.0, 0.5])).to_event(2))


def observe_together(memory, u):
    values = jnp.stack([memory @ u["key"], memory @ u["query"]], axis=-1)
    law = dist.MultivariateNormal(values, u["noise"] * COVARIANCE).to_event(1)
    numpyro.sample("values", law, obs=jnp.stack([u["value"], -u["value"]], axis=-1))


OUTSIDE = {
    "rotation": (DesignModel(prior, rotate, observe), "keys are mixed"),
    "noisy read-out": (DesignModel(prior, transition, observe, read_noisily), ""),
    "two queries": (DesignModel(prior, transition, observe, read_twice), "not the memory times"),
    "correlated prior": (DesignModel(correlated_prior, transition, observe), "correlated in the"),
    "uneven prior": (DesignModel(uneven_prior, transition, observe), ""),
    "correlated noise": (DesignModel(prior, transition, observe_together), "noise of a token's"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_compiled_model_outside_the_catalogue_is_its_filter(name):
    model, reason = OUTSIDE[name]
    exact, _ = derived(name)
    memory = compile_filter(certify(exact))
    assert isinstance(memory, GeneralMemory if reason else RegressionMemory)
    assert reason in memory.why
    assert memory.algorithm == ("token" if reason else "chunked")
    assert memory.value_width == (6 if name == "two queries" else 3)
    u = model.draw_inputs(jax.random.key(2), STEPS)
    compiled = [memory]
    if name == "rotation":
        compiled.append(compile_filter(certify(exact), algorithm="parallel"))
    assert_compile_to(exact, Exact(), u, *compiled)


@pytest.mark.parametrize("policy", [Isotropic(), Diagonal(), Forget()])
def test_a_policy_keeps_an_uneven_prior(policy):
    exact, _ = derived("uneven prior")
    memory = compile_filter(certify(exact, policy))
    if isinstance(policy, Forget):
        assert memory.why.endswith("is forgotten token by token")
        with pytest.raises(ValueError, match="`algorithm` is 'chunked', which does not apply"):
            compile_filter(certify(exact, policy), algorithm="chunked")
    assert ("differ in their prior variance" in memory.why) == isinstance(policy, Isotropic)
    u = exact.model.draw_inputs(jax.random.key(2), STEPS)
    u["forget"] = jax.random.uniform(jax.random.key(3), (STEPS,), minval=0.8)
    u["decay"] = jax.random.uniform(jax.random.key(4), (STEPS, KEY_WIDTH), minval=0.5)
    prediction = jax.jit(lambda u: memory(u, memory.init_state())[0])(u)
    assert_is(prediction, jax.jit(lambda u: exact.run(u, policy=policy))(u))


def test_a_policy_takes_two_observations_in_the_general_form():
    exact, _ = derived("deltaproduct")
    assert "several observations" in compile_filter(certify(exact, Diagonal())).why


def test_decays_of_either_sign_are_followed():
    exact, _ = derived("kda")
    u = exact.model.draw_inputs(jax.random.key(5), STEPS)
    signs = jax.random.rademacher(jax.random.key(6), u["decay"].shape, float)
    signs = signs.at[:3].set([[0, 1], [1, 1], [-1, 0]])
    u["decay"] = u["decay"] * signs
    for policy, algorithm in ((Exact(), "chunked"), (Diagonal(), "parallel")):
        assert_compile_to(exact, policy, u, RegressionMemory(exact, policy, algorithm))


# -- packed documents and padding -----------------------------------------------------------------

REAL = [range(2, 6), range(6, 10), range(12, 16)]
"""Padding, two documents, padding that has the third one's number, the third one, padding."""

SEGMENTS = jnp.asarray(np.repeat([7, 4, 9, 4, 4], [2, 4, 4, 2, 5]))


@pytest.mark.parametrize(
    ("name", "algorithm", "general"),
    [
        ("bayesian_layer", "chunked", False),
        ("bayesian_layer", "token", True),
        ("kda", "token", False),
        ("gla", "parallel", True),
    ],
)
def test_packed_documents_are_filtered_as_if_alone(name, algorithm, general):
    entry = CATALOGUE[name]
    exact, policy = derived(name)[0], entry.policy
    u = entry.model().draw_inputs(jax.random.key(7), len(SEGMENTS))
    if name == "kda":
        u["decay"] = u["decay"].at[::3].multiply(-1)
    places = jnp.asarray(np.stack(REAL))
    mask = jnp.zeros(len(SEGMENTS), bool).at[places.ravel()].set(True)
    spoilt = {  # what stands at padding does not matter
        key: jnp.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, -jnp.inf)
        for key, array in u.items()
    }
    memory = (
        GeneralMemory(exact, policy, algorithm, "")
        if general
        else RegressionMemory(exact, policy, algorithm)
    )

    def packed(u):
        return memory(u, memory.init_state(), segment_ids=SEGMENTS, mask=mask)

    def alone(u):
        return memory(u, memory.init_state())[1]

    documents = {key: array[places] for key, array in u.items()}
    filtered = jax.jit(jax.vmap(lambda u: exact.run(u, policy=policy)))(documents)
    prediction, state = jax.jit(packed)(spoilt)
    together = jax.tree.map(lambda part: part[places], prediction)
    for i in range(len(REAL)):
        pick = jax.tree.map(lambda part: part[i], (together, filtered))  # noqa: B023
        assert_is(*pick)
    for part in jax.tree.leaves(prediction):
        np.testing.assert_array_equal(part[~mask], 0)
    last = jax.jit(alone)({key: array[2] for key, array in documents.items()})
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    if algorithm == "token":
        return
    moved = jax.jit(jax.grad(lambda u: jnp.sum(packed(u)[0].log_evidence)))(spoilt)
    for gradient in jax.tree.leaves(moved):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[~mask], 0)


@pytest.mark.parametrize("name", ["bayesian_layer", "gla"])
def test_a_sequence_may_be_empty_or_one_token(name):
    exact, _ = derived(name)
    memory = compile_filter(certify(exact))
    u = exact.model.draw_inputs(jax.random.key(0), 1)
    assert_compile_to(exact, Exact(), u, memory)
    none = {key: array[:0] for key, array in u.items()}
    prediction, state = jax.jit(lambda u: memory(u, memory.init_state()))(none)
    assert prediction.mean.shape == (0, 3)
    assert eqx.tree_equal(state, memory.init_state())


# -- widths and refusals --------------------------------------------------------------------------


def test_a_verified_filter_compiles_at_other_widths():
    design = CATALOGUE["bayesian_layer"].model
    certificate = certify(derived("bayesian_layer")[0])
    wide = compile_filter(certificate, model=design(5, 4), algorithm="token")
    assert wide.value_width == 5
    assert wide.inputs["key"] == (4,)
    u = design(5, 4).draw_inputs(jax.random.key(0), STEPS)
    assert_compile_to(draft(design(5, 4)), Exact(), u, wide)


@pytest.fixture(scope="module")
def certificates():
    with jax.enable_x64(True):
        return {
            name: certify(derived(name)[0], CATALOGUE[name].policy)
            for name in ("bayesian_layer", "gla", "longhorn", "deltanet")
        }


def test_what_is_not_a_certificate_is_refused(certificates, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="of type ExactFilter; pass what"):
        compile_filter(certificates["gla"].exact_filter)


def test_a_certificate_with_a_failed_check_is_refused(certificates):
    good = certificates["gla"]
    failed = replace(good.checks[0], statistic=2.0)
    with pytest.raises(ValueError, match=r"these checks failed: \['joint conditioning mean'\]"):
        compile_filter(replace(good, checks=(failed, *good.checks[1:])))


def test_a_certificate_without_an_oracle_is_refused(certificates):
    good = certificates["gla"]
    with pytest.raises(ValueError, match=r"not judged by \['NUTS'\]"):
        compile_filter(replace(good, checks=(good.checks[0], good.checks[2])))


def test_an_algorithm_that_does_not_apply_is_refused(certificates):
    with pytest.raises(ValueError, match=r'`algorithm` is "chunked", .*: entries are filtered'):
        compile_filter(certificates["gla"], algorithm="chunked")
    with pytest.raises(ValueError, match='`algorithm` is "parallel", which takes the exact'):
        compile_filter(certificates["longhorn"], algorithm="parallel")
    assert compile_filter(certificates["gla"], algorithm="parallel").algorithm == "parallel"


def test_noise_that_is_not_positive_is_refused(certificates):
    memory = compile_filter(certificates["bayesian_layer"])
    u = memory.exact.model.draw_inputs(jax.random.key(0), 3)
    u["noise"] = u["noise"].at[1].set(0)
    with pytest.raises(RuntimeError, match="the model's noise is not positive"):
        jax.block_until_ready(eqx.filter_jit(memory)(u, memory.init_state()))


def test_noise_outside_the_range_of_float32_is_refused(certificates):
    memory = compile_filter(certificates["bayesian_layer"], algorithm="token")
    run = eqx.filter_jit(memory)
    u = memory.exact.model.draw_inputs(jax.random.key(0), 3)
    u["key"] = u["key"].at[1].set(1.0)
    u["noise"] = u["noise"].at[1].set(1e-4)
    with pytest.raises(RuntimeError, match="exceeds 10000, where float32 loses"):
        jax.block_until_ready(run(u, memory.init_state()))
    u["noise"] = u["noise"].at[1].set(1e-3)
    assert run(u, memory.init_state())[0].mean.dtype == jnp.float32


def test_float32_without_a_covariance_takes_any_noise(certificates):
    memory = compile_filter(certificates["deltanet"], algorithm="token")
    u = memory.exact.model.draw_inputs(jax.random.key(0), 3)
    u["noise"] = u["noise"].at[1].set(1e-20)
    assert np.all(np.isfinite(eqx.filter_jit(memory)(u, memory.init_state())[0].mean))


def test_a_filter_that_ran_in_float64_compiles_to_float32(certificates):
    exact = certificates["bayesian_layer"].exact_filter
    with jax.enable_x64(True):
        exact.run(exact.model.draw_inputs(jax.random.key(0), 3))
    assert compile_filter(certificates["bayesian_layer"]).init_state().mean.dtype == jnp.float32
