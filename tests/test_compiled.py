"""Compiled filters are the exact ones they were compiled from, or are refused with a reason."""

from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from design_models import CATALOGUE, DesignModel, Diagonal, Exact, Forget, Isotropic
from inference.certificate import Certificate
from inference.derivation import draft
from inference.kinship import Kinship
from inference.oracles import joint, nuts, simulation
from inference.oracles.check import Check
from layers import compile_filter, compile_layer
from layers.compiled import CellMemory, GeneralMemory, KeyedMemory
from layers.rules import Additive

pytestmark = pytest.mark.xdist_group("compiled")

STEPS = 6
CHUNKS = 70
"""More than one chunk."""

TOLERANCE = 1e-10
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is most of the time here."""


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
def drafted(name):
    """The filter of a catalogue entry or of a model below."""
    return draft(CATALOGUE[name].model() if name in CATALOGUE else OUTSIDE[name][0])


@cache
def compiled(name):
    """A catalogue entry's memory under its own policy, or that of a model below."""
    policy = CATALOGUE[name].policy if name in CATALOGUE else EXACT
    return compile_filter(certify(drafted(name), policy))


def decode(memory, u):
    """All tokens, one by one."""
    return jax.lax.scan(lambda s, u: memory.step(u, s)[::-1], memory.init_state(), u)[1]


def said(prediction):
    """What a prediction says: its mean, variances by entry, log evidence."""
    variance = prediction.variance
    if variance.ndim == 1:
        variance = jnp.broadcast_to(variance[:, None], prediction.mean.shape)
    return prediction.mean, variance, prediction.log_evidence


def filtered(exact, policy, u):
    """The same of the exact filter."""
    found = exact.run(u, policy=policy)
    return found.outputs, found.output_variances, found.log_evidence


def weigh(outputs):
    """One number that every entry of every output moves in its own way."""
    weights = [np.random.default_rng(i).normal(size=part.shape) for i, part in enumerate(outputs)]
    return sum(jnp.sum(part * own) for part, own in zip(outputs, weights, strict=True))


def assert_same(ours, theirs, tolerance=TOLERANCE):
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, other, rtol=tolerance, atol=tolerance)


def assert_compile_to(exact, policy, u, *compiled, gradients=False, general=()):
    """These memories are the filter: all in one program.

    Where gradients are compared, so is the first memory step by step. The `general` ones
    differentiate as the filter does, and are compared in value alone.
    """
    forms = [lambda u: filtered(exact, policy, u)]
    forms += [lambda u, m=m: said(m(u, m.init_state())[0]) for m in compiled]

    def both(form):
        def objective(u):
            outputs = form(u)
            return weigh(outputs), outputs

        return jax.grad(objective, has_aux=True) if gradients else lambda u: ((), form(u))

    @partial(jax.jit, compiler_options=FAST)
    def everything(u):
        stepwise = [said(decode(compiled[0], u))] if gradients else []
        others = [said(memory(u, memory.init_state())[0]) for memory in general]
        return stepwise + others, [both(form)(u) for form in forms]

    plain, (expected, *found) = everything(u)
    for outputs in plain:
        assert_same(outputs, expected[1])
    for slopes, outputs in found:
        assert_same(outputs, expected[1])
        assert_same(slopes, expected[0], 1e-8)


ALGORITHMS = ("token", "chunked", "parallel")
GENERAL = ("bayesian_layer", "deltaproduct", "mesanet", "kalman_delta_diagonal")
"""Recurrences that also run in the general form here, one of each policy."""

RULES = {
    "bayesian_layer": KeyedMemory,
    "deltaproduct": KeyedMemory,
    "mesanet": KeyedMemory,
    "kalman_delta_isotropic": KeyedMemory,
    "kalman_delta_diagonal": KeyedMemory,
    "gla": KeyedMemory,
    "kalman_linear_attention": CellMemory,
    "longhorn": CellMemory,
}
"""A recurrence of every rule, and the form it takes."""

MORE = (
    "gla",
    "deltaproduct",
    "mesanet",
    "kalman_delta_isotropic",
    "kalman_delta_diagonal",
    "longhorn",
)
"""Rules whose scans tests/test_scans.py differentiates in every form."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] if name in MORE else []) for name in RULES],
)
def test_every_form_of_every_rule_is_its_filter_with_its_gradients(name):
    exact, policy, memory = drafted(name), CATALOGUE[name].policy, compiled(name)
    assert isinstance(memory, RULES[name])
    forms = [memory]
    if isinstance(memory, KeyedMemory):
        others = [a for a in ALGORITHMS if a != memory.algorithm]
        forms += [KeyedMemory(exact, memory.rule, algorithm) for algorithm in others]
    if name in ("gla", "kalman_linear_attention"):
        forms.append(GeneralMemory(exact, policy, "parallel", ""))
    general = [GeneralMemory(exact, policy, "token", "")] if name in GENERAL else []
    steps = CHUNKS if name == "bayesian_layer" else STEPS
    u = CATALOGUE[name].model().draw_inputs(jax.random.key(1), steps)
    assert_compile_to(exact, policy, u, *forms, gradients=True, general=general)


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - set(RULES)))
def test_a_compiled_recurrence_is_its_filter(name):
    memory = compiled(name)
    assert isinstance(memory, KeyedMemory)
    assert (memory.algorithm, memory.why) == ("chunked", "")
    u = CATALOGUE[name].model().draw_inputs(jax.random.key(1), STEPS)
    assert_compile_to(drafted(name), CATALOGUE[name].policy, u, memory)


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


def write_shifted(memory, u):
    """Evidence about what is added that is no outer product."""
    write = numpyro.sample("write", dist.Normal(jnp.zeros((3, 2)), 0.5).to_event(2))
    seen = jnp.outer(u["value"], u["key"]) + 1
    numpyro.sample("evidence", dist.Normal(write, 0.7).to_event(2), obs=seen)
    return 0.9 * memory + write


def see_nothing(memory, u):
    """All the evidence is about what is added."""


OUTSIDE = {
    "rotation": (DesignModel(prior, rotate, observe), "keys are mixed"),
    "noisy read-out": (DesignModel(prior, transition, observe, read_noisily), ""),
    "two queries": (DesignModel(prior, transition, observe, read_twice), "not the memory times"),
    "correlated prior": (DesignModel(correlated_prior, transition, observe), "correlated in the"),
    "uneven prior": (DesignModel(uneven_prior, transition, observe), ""),
    "correlated noise": (DesignModel(prior, transition, observe_together), "noise of a token's"),
    "shifted writes": (DesignModel(prior, write_shifted, see_nothing), "no outer product"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_compiled_model_outside_the_catalogue_is_its_filter(name):
    model, reason = OUTSIDE[name]
    exact, memory = drafted(name), compiled(name)
    assert isinstance(memory, GeneralMemory if reason else KeyedMemory)
    assert reason in memory.why
    assert memory.algorithm == ("token" if reason else "chunked")
    assert memory.backend.startswith("XLA, token by token" if reason else "Pallas kernels")
    assert memory.backend.endswith(f"no kernel, as {memory.why}." if reason else "elsewhere.")
    assert memory.value_width == (6 if name == "two queries" else 3)
    u = model.draw_inputs(jax.random.key(2), STEPS)
    forms = [memory]
    if name == "rotation":
        forms.append(compile_filter(certify(exact), algorithm="parallel"))
    assert_compile_to(exact, EXACT, u, *forms, gradients=name == "rotation")


def test_decays_per_key_reach_the_kernels_and_another_policy_does_not():
    exact = drafted("kda")
    assert compile_filter(certify(exact)).backend.startswith("Pallas kernels on Hopper GPUs")
    backend = compile_filter(certify(exact, CATALOGUE["kda"].policy)).backend
    assert backend.startswith("XLA, in chunks of tokens; no kernel, as `rule` is Reset")


@pytest.mark.parametrize("policy", [Isotropic(), Diagonal(), Forget()])
def test_a_policy_keeps_an_uneven_prior(policy):
    exact = drafted("uneven prior")
    memory = compile_filter(certify(exact, policy))
    if isinstance(policy, Forget):
        assert memory.why.endswith("is forgotten token by token")
        with pytest.raises(ValueError, match="`algorithm` is 'chunked', which does not apply"):
            compile_filter(certify(exact, policy), algorithm="chunked")
    assert ("differ in their prior variance" in memory.why) == isinstance(policy, Isotropic)
    u = exact.model.draw_inputs(jax.random.key(2), STEPS)
    u["forget"] = jax.random.uniform(jax.random.key(3), (STEPS,), minval=0.8)
    u["decay"] = jax.random.uniform(jax.random.key(4), (STEPS, KEY_WIDTH), minval=0.5)
    assert_compile_to(exact, policy, u, memory)


def test_a_policy_takes_two_observations_in_the_general_form():
    exact = drafted("deltaproduct")
    assert "several observations" in compile_filter(certify(exact, Diagonal())).why


@pytest.mark.parametrize("name", ["kda", "gla"])
def test_decays_of_either_sign_are_followed(name):
    exact = drafted(name)
    u = exact.model.draw_inputs(jax.random.key(5), STEPS)
    signs = jax.random.rademacher(jax.random.key(6), u["decay"].shape, float)
    signs = signs.at[:3].set([[0, 1], [1, 1], [-1, 0]])
    u["decay"] = u["decay"] * signs
    rules = ((EXACT, "chunked"), (Diagonal(), "parallel"))
    for rule, algorithm in ((Additive(), "chunked"),) if name == "gla" else rules:
        policy = EXACT if name == "gla" else rule
        assert_compile_to(exact, policy, u, KeyedMemory(exact, rule, algorithm))


# -- packed documents and padding -----------------------------------------------------------------

REAL = [range(2, 6), range(6, 10), range(12, 16)]
"""Padding, two documents, padding that has the third one's number, the third one, padding."""

SEGMENTS = jnp.asarray(np.repeat([7, 4, 9, 4, 4], [2, 4, 4, 2, 5]))


DOCUMENTS = {
    "in chunks": ("bayesian_layer", lambda exact: KeyedMemory(exact, EXACT, "chunked")),
    "by token": ("kda", lambda exact: KeyedMemory(exact, CATALOGUE["kda"].policy, "token")),
    "added": ("gla", lambda exact: KeyedMemory(exact, Additive(), "chunked")),
    "by entry": ("kalman_linear_attention", lambda exact: CellMemory(exact, EXACT)),
    "in general": ("bayesian_layer", lambda exact: GeneralMemory(exact, EXACT, "token", "")),
    "in general in parallel": ("gla", lambda exact: GeneralMemory(exact, EXACT, "parallel", "")),
}


@pytest.mark.parametrize("form", DOCUMENTS)
def test_packed_documents_are_filtered_as_if_alone(form):
    name, make = DOCUMENTS[form]
    exact, policy = drafted(name), CATALOGUE[name].policy
    memory = make(exact)
    u = CATALOGUE[name].model().draw_inputs(jax.random.key(7), len(SEGMENTS))
    if name == "kda":
        u["decay"] = u["decay"].at[::3].multiply(-1)
    places = jnp.asarray(np.stack(REAL))
    mask = jnp.zeros(len(SEGMENTS), bool).at[places.ravel()].set(True)
    spoilt = {  # what stands at padding does not matter
        key: jnp.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, -jnp.inf)
        for key, array in u.items()
    }

    def packed(u):
        prediction, state = memory(u, memory.init_state(), segment_ids=SEGMENTS, mask=mask)
        return weigh([part[places] for part in said(prediction)]), (prediction, state)

    def everything(u, spoilt):
        documents = {key: array[places] for key, array in u.items()}
        alone = jax.vmap(lambda u: filtered(exact, policy, u))(documents)
        last = ()
        if form in ("in chunks", "by entry", "in general"):  # the state after the third alone
            third = {key: array[2] for key, array in documents.items()}
            last = memory(third, memory.init_state())[1]
        if form in ("by token", "in general"):
            return ({}, packed(spoilt)[1]), alone, last
        return jax.grad(packed, has_aux=True)(spoilt), alone, last

    (slopes, (prediction, state)), alone, last = jax.jit(everything, compiler_options=FAST)(
        u, spoilt
    )
    assert_same([part[places] for part in said(prediction)], alone)
    if last != ():
        assert_same(state, last)
    for part in jax.tree.leaves((prediction, slopes)):
        np.testing.assert_array_equal(part[~mask], 0)
        assert np.all(np.isfinite(part))


@pytest.mark.parametrize("name", ["bayesian_layer", "kalman_linear_attention", "rotation"])
def test_a_sequence_may_be_empty_or_one_token(name):
    memory = compiled(name)
    u = memory.exact.model.draw_inputs(jax.random.key(0), 1)
    prediction, _ = jax.jit(memory, compiler_options=FAST)(u, memory.init_state())
    assert_same(said(prediction), filtered(memory.exact, EXACT, u))
    none = {key: array[:0] for key, array in u.items()}
    prediction, state = jax.jit(memory, compiler_options=FAST)(none, memory.init_state())
    assert prediction.mean.shape == (0, 3)
    assert eqx.tree_equal(state, memory.init_state())


# -- widths and refusals --------------------------------------------------------------------------


def test_a_verified_filter_compiles_at_other_widths():
    design = CATALOGUE["bayesian_layer"].model
    certificate = certify(drafted("bayesian_layer"))
    wide = compile_filter(certificate, model=design(4, 2), algorithm="token")
    assert wide.value_width == 4
    assert wide.inputs["key"] == (2,)
    u = design(4, 2).draw_inputs(jax.random.key(0), STEPS)
    assert_compile_to(draft(design(4, 2)), EXACT, u, wide)


@pytest.fixture(scope="module")
def certificates():
    with jax.enable_x64(True):
        return {
            name: certify(drafted(name), CATALOGUE[name].policy)
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
        compile_filter(certificates["longhorn"], algorithm="chunked")
    with pytest.raises(ValueError, match='`algorithm` is "parallel", which takes the exact'):
        compile_filter(certificates["longhorn"], algorithm="parallel")
    assert compile_filter(certificates["gla"], algorithm="parallel").algorithm == "parallel"


def test_noise_that_float32_does_not_stand_is_refused(certificates):
    memory = compile_filter(certificates["bayesian_layer"], algorithm="token")
    run = eqx.filter_jit(memory)
    u = memory.exact.model.draw_inputs(jax.random.key(0), 3)
    u["key"] = u["key"].at[1].set(1.0)

    def at(noise):
        now = u | {"noise": u["noise"].at[1].set(noise)}
        return jax.block_until_ready(run(now, memory.init_state()))[0]

    with pytest.raises(RuntimeError, match="the model's noise is not positive"):
        at(0)
    with pytest.raises(RuntimeError, match="exceeds 10000, where float32 loses"):
        at(1e-4)
    assert at(1e-3).mean.dtype == jnp.float32


def test_noise_that_float32_does_not_stand_is_refused_in_the_general_form():
    memory = compile_filter(certify(drafted("rotation")))
    u = memory.exact.model.draw_inputs(jax.random.key(0), 3)
    u["key"] = u["key"].at[1].set(1.0)
    run = eqx.filter_jit(memory)
    small = u | {"noise": u["noise"].at[1].set(1e-4)}
    with pytest.raises(RuntimeError, match="exceeds 10000, where float32 loses"):
        jax.block_until_ready(run(small, memory.init_state()))
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


def test_float32_layers_share_keys_and_queries_between_heads(certificates):
    def sources(**options):
        layer = compile_layer(certificates["gla"], 8, heads=4, **options, rng=jax.random.key(0))
        return layer.sources

    shared = sources(key_heads=2)
    for name, source in sources().items():
        groups = 2 if name in ("key", "query") else 1
        assert shared[name].weight.size == source.weight.size // groups
    with pytest.raises(ValueError, match="`heads` is 4; it must be a multiple of `key_heads`, 3"):
        sources(key_heads=3)
