"""One suite for every algorithm of the scans: values and the gradient of every input."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scan_cases import LENGTHS, RULES, Case, draw_initial, draw_stream

from layers.rules import Additive, Diagonal, Exact, Forget, Isotropic, Reset, Restored
from layers.scans import filter_scan
from layers.stream import Belief, Stream

pytestmark = pytest.mark.xdist_group("scans")

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is most of the time here."""

FULL = Case(150, decay="key", drift="key", starts=(7, 70, 71, 128))
FADING = Case(150, starts=(7, 70, 71, 128), rate=True)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# -- the oracle ---------------------------------------------------------------------------------


def textbook(stream: Stream, rule, prior: float, mean: np.ndarray, covariance: np.ndarray | None):
    """Every rule as its equations say, one token and observation after another, in NumPy."""
    stream = jax.tree.map(np.asarray, stream)
    time, width = stream.query.shape
    identity = np.eye(width)
    covariance = np.zeros((width, width)) if covariance is None else covariance
    covariance = np.diag(covariance * np.ones(width)) if covariance.ndim < 2 else covariance
    means, variances, evidence = [], [], []
    for t in range(time):
        if stream.starts is not None and stream.starts[t]:
            mean, covariance = np.zeros_like(mean), prior * identity
        decay = np.ones(width) if stream.log_decay is None else np.exp(stream.log_decay[t])
        decay = decay * np.ones(width)
        drift = np.zeros(width) if stream.drift is None else stream.drift[t] * np.ones(width)
        rate = 1.0 if stream.rate is None else stream.rate[t]
        keys, values, noises = stream.key[t], stream.value[t], stream.noise[t]
        pairs = zip(np.atleast_2d(keys), np.atleast_2d(values), np.atleast_1d(noises), strict=True)
        mean = mean * decay
        if isinstance(rule, Isotropic):
            decay, drift = np.sqrt(np.mean(decay**2)), np.mean(drift)
        covariance = np.diag(decay * np.ones(width)) @ covariance @ np.diag(decay * np.ones(width))
        seen = 0.0
        for index, (key, value, noise) in enumerate(pairs):
            added = drift if index == 0 else np.zeros(width)
            if isinstance(rule, Additive):
                mean = mean + np.outer(value, key)
                kept = np.where(added > 0, 1 / (1 / np.maximum(added, 1e-300) + 1 / noise), 0)
                covariance = covariance + np.diag(kept * np.ones(width))
                continue
            covariance = covariance + np.diag(added * np.ones(width))
            match rule:
                case Reset():
                    covariance = rule.variance * identity
                case Restored():
                    dial = np.broadcast_to(np.asarray(rule.restoration), time)[t]
                    reset = np.broadcast_to(np.asarray(rule.variance), time)[t] * identity
                    covariance = dial * covariance + (1 - dial) * reset
                case Forget() if index == 0:
                    precision = np.linalg.inv(covariance)
                    faded = rate * precision + (1 - rate) * identity / prior
                    mean = rate * mean @ precision @ np.linalg.inv(faded)
                    covariance = np.linalg.inv(faded)
            spread = key @ covariance @ key + noise
            off = value - mean @ key
            mean = mean + np.outer(off, covariance @ key) / spread
            seen += -0.5 * (off @ off / spread + len(off) * np.log(2 * np.pi * spread))
            information = np.linalg.inv(covariance) + np.outer(key, key) / noise
            match rule:
                case Diagonal():
                    count = width if rule.count is None else rule.count
                    own = 1 / np.diag(covariance) + count * key**2 / noise
                    covariance = np.diag(1 / own)
                case Isotropic():
                    count = width if rule.count is None else rule.count
                    own = 1 / covariance[0, 0] + count * np.mean(key**2) / noise
                    covariance = identity / own
                case _:
                    covariance = np.linalg.inv(information)
        query = stream.query[t]
        means.append(mean @ query)
        variances.append(query @ covariance @ query)
        evidence.append(seen)
    last = {Reset: None, Diagonal: np.diag(covariance), Additive: np.diag(covariance)}
    last[Isotropic] = covariance[0, 0]
    return {
        "outputs": np.reshape(means, (time, len(mean))),
        "variances": np.array(variances),
        "log evidence": np.array(evidence),
        "last mean": mean,
        "last covariance": last.get(type(rule), covariance),
    }


# -- what is compared -----------------------------------------------------------------------------


def arguments_of(rule, case: Case, dtype: str = "float64"):
    """Every differentiable input, by name, and the documents' starts."""
    stream = draw_stream(case, dtype=dtype)
    mean, *covariance = draw_initial(rule, case.key, case.value)
    named = {
        name: getattr(stream, name)
        for name in ("key", "value", "query", "noise", "log_decay", "drift", "rate")
    }
    named |= {"prior variance": 0.9, "initial mean": mean}
    named |= {"initial covariance": covariance[0]} if covariance else {}
    if isinstance(rule, Restored):
        named |= {"λ": rule.restoration, "σ²": rule.variance}
    cast = {name: jnp.asarray(part, dtype) for name, part in named.items() if part is not None}
    return cast, stream.starts


def run(arguments, starts, rule, algorithm, dtype="float32"):
    """Every output, by name."""
    names = ("key", "value", "query", "noise", "log_decay", "drift")
    stream = Stream(
        *(arguments.get(name) for name in names), starts=starts, rate=arguments.get("rate")
    )
    covariance = arguments.get("initial covariance")
    if covariance is not None and covariance.ndim == 2:
        covariance = (covariance + covariance.T) / 2
    if isinstance(rule, Restored):
        rule = Restored(arguments["λ"], arguments["σ²"])
    last, reading = filter_scan(
        stream,
        arguments["prior variance"],
        rule,
        initial=Belief(arguments["initial mean"], covariance),
        algorithm=algorithm,
        dtype=dtype,
    )
    return {
        "outputs": reading.mean,
        "variances": reading.variance,
        "log evidence": reading.log_evidence,
        "last mean": last.mean,
        "last covariance": last.covariance,
    }


def weigh(outputs):
    """One number that every entry of every output moves in its own way."""
    total = 0.0
    for name, part in outputs.items():
        if part is not None:
            weights = np.random.default_rng(len(name)).normal(size=part.shape)
            total = total + jnp.sum(part * jnp.asarray(weights, part.dtype))
    return total


def differentiated(kind: str, algorithm: str):
    """(arguments, starts) -> outputs, and the gradient of `weigh` for every argument."""
    rule = RULES[kind](1)

    def objective(arguments, starts):
        outputs = run(arguments, starts, rule, algorithm)
        return weigh(outputs), outputs

    def both(arguments, starts):
        gradients, outputs = jax.grad(objective, has_aux=True)(arguments, starts)
        return outputs, gradients

    return both


@cache
def compiled(kind: str, algorithm: str):
    return jax.jit(differentiated(kind, algorithm), compiler_options=FAST)


@cache
def computed(name: str, case: Case, algorithm: str, dtype: str = "float64"):
    """Outputs and gradients of a rule by one algorithm, as NumPy arrays."""
    arguments, starts = arguments_of(RULES[name](case.time), case, dtype)
    kind = "restored 0" if name.startswith("restored") else name  # λ is an argument
    return jax.tree.map(np.asarray, compiled(kind, algorithm)(arguments, starts))


def assert_close(found, expected, tolerance):
    """Each entry within the tolerance, in units of the largest entry of its array or of 1."""
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        if part is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == part.shape, name
        if part.size:
            unit = max(1.0, np.abs(part).max())
            worst = np.abs(found[name].astype(float) - part).max() / unit
            assert worst <= tolerance, f"{name}: {worst:.1e}"


def assert_agree(name: str, case: Case, algorithm: str):
    found, expected = computed(name, case, algorithm), computed(name, case, "token")
    assert_close(found[0], expected[0], 1e-8)
    assert_close(found[1], expected[1], 1e-8)


# -- values and gradients -------------------------------------------------------------------------

SEVERAL = [name for name in RULES if name not in ("diagonal", "isotropic")]


def several(name: str) -> Case:
    """Two observations a token."""
    rates = {} if name == "forget" else {"decay": "scalar", "drift": "scalar"}
    return Case(12, starts=(3,), observations=2, rate=name == "forget", **rates)


def assert_textbook(name: str, case: Case):
    rule = RULES[name](case.time)
    arguments, _ = arguments_of(rule, case)
    covariance = arguments.get("initial covariance")
    expected = textbook(
        draw_stream(case),
        rule,
        0.9,
        np.asarray(arguments["initial mean"]),
        None if covariance is None else np.asarray(covariance),
    )
    assert_close(computed(name, case, "token")[0], expected, 1e-10)


@pytest.mark.parametrize("name", RULES)
def test_tokens_follow_the_textbook(name):
    assert_textbook(name, FADING if name == "forget" else FULL)


@pytest.mark.parametrize("name", SEVERAL)
def test_tokens_with_several_observations_follow_the_textbook(name):
    assert_textbook(name, several(name))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"restored by token"}))
def test_chunks_of_every_rule_agree_with_its_tokens(name):
    assert_agree(name, FADING if name == "forget" else FULL, "chunked")


@pytest.mark.parametrize("name", ["exact", "reset"])
def test_chunks_in_parallel_agree_with_their_tokens(name):
    assert_agree(name, FULL, "parallel")


@pytest.mark.parametrize(
    "name",
    ["additive", "forget", "diagonal", pytest.param("isotropic", marks=pytest.mark.exhaustive)],
)
def test_shared_rates_in_parallel_agree_with_their_tokens(name):
    case = Case(65, starts=(20,), rate=True) if name == "forget" else SHARED
    assert_agree(name, case, "parallel")


@pytest.mark.parametrize("time", LENGTHS)
def test_every_length_follows_the_textbook(time):
    case = Case(time)
    arguments, starts = arguments_of(Exact(), case)
    forward = jax.jit(lambda arguments: run(arguments, starts, Exact(), "chunked"))
    mean, covariance = draw_initial(Exact(), case.key, case.value)
    found = jax.tree.map(np.asarray, forward(arguments))
    assert_close(found, textbook(draw_stream(case), Exact(), 0.9, mean, covariance), 1e-10)


SHARED = Case(65, decay="scalar", drift="scalar", starts=(20,))
"""Rates that all keys share, and one token more than a chunk."""


def test_rates_that_keys_share_agree_with_their_tokens():
    assert_agree("exact", SHARED, "chunked")


@pytest.mark.parametrize(("decay", "drift"), [("none", "key"), ("key", "none")])
def test_rates_may_be_absent(decay, drift):
    assert_agree("exact", Case(17, decay=decay, drift=drift), "chunked")


def test_documents_restart_without_drift():
    assert_agree("exact", Case(17, decay="scalar", starts=(0, 5, 16)), "chunked")


@pytest.mark.parametrize("name", ["restored by token", "additive", "forget"])
def test_several_observations_agree_with_their_tokens(name):
    assert_agree(name, several(name), "chunked")


@pytest.mark.parametrize("algorithm", ["token", "chunked", "parallel"])
def test_no_tokens_change_nothing(algorithm):
    case = Case(0, observations=2)
    arguments, starts = arguments_of(Exact(), case)
    found = run(arguments, starts, Exact(), algorithm)
    np.testing.assert_array_equal(found["last mean"], arguments["initial mean"])
    np.testing.assert_allclose(found["last covariance"], arguments["initial covariance"])
    assert found["outputs"].shape == (0, 3)


# -- documents and states -------------------------------------------------------------------------


def test_packed_documents_are_each_alone():
    """Values and gradients; both documents in one program, so that they compile once."""
    case = Case(40, decay="scalar", drift="scalar")
    rule = Exact()
    arguments, _ = arguments_of(rule, case)
    at = 21
    starts = jnp.arange(40) == at
    timed = {"key", "value", "query", "noise", "log_decay", "drift"}

    def packed(arguments):
        outputs = run(arguments, starts, rule, "chunked")
        return weigh(outputs), outputs

    def alone(arguments):
        rest = {key: part for key, part in arguments.items() if key not in timed}
        first = run(rest | {key: arguments[key][:at] for key in timed}, None, rule, "chunked")
        prior = arguments["prior variance"]
        rest |= {"initial mean": jnp.zeros((3, 5)), "initial covariance": prior * jnp.eye(5)}
        second = run(rest | {key: arguments[key][at:] for key in timed}, None, rule, "chunked")
        outputs = second | {
            key: jnp.concatenate([first[key], second[key]])
            for key in ("outputs", "variances", "log evidence")
        }
        return weigh(outputs), outputs

    def both(arguments):
        return tuple(jax.grad(form, has_aux=True)(arguments) for form in (packed, alone))

    found, expected = jax.tree.map(np.asarray, jax.jit(both, compiler_options=FAST)(arguments))
    assert_close(found[1], expected[1], 1e-10)
    assert_close(found[0], expected[0], 1e-8)


def test_two_halves_are_the_whole():
    rule, stream = Exact(), draw_stream(Case(32, decay="scalar", drift="scalar"))

    def halves(stream):
        state, first = filter_scan(jax.tree.map(lambda part: part[:16], stream), 0.9, rule)
        second = jax.tree.map(lambda part: part[16:], stream)
        state, second = filter_scan(second, 0.9, rule, initial=state)
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)

    both = jax.jit(lambda s: (halves(s), filter_scan(s, 0.9, rule)), compiler_options=FAST)
    found, expected = both(stream)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), found, expected)


def test_heads_are_mapped():
    arguments, starts = arguments_of(Exact(), SHARED)
    heads = {name: jnp.stack([part, 0.9 * part]) for name, part in arguments.items()}
    one = differentiated("exact", "chunked")
    found = jax.jit(jax.vmap(lambda head: one(head, starts)), compiler_options=FAST)(heads)
    for head in range(2):
        alone = {name: part[head] for name, part in heads.items()}
        expected = compiled("exact", "chunked")(alone, starts)
        for parts, others in zip(found, expected, strict=True):
            own = {name: np.asarray(part[head]) for name, part in parts.items()}
            assert_close(own, jax.tree.map(np.asarray, others), 1e-10)


# -- strong decays and the dial's ends ------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "restored 0.3", "diagonal", "additive"])
def test_strong_decay_neither_overflows_nor_divides_by_zero(name):
    case = replace(FULL, weakest=-50)
    assert_agree(name, case, "chunked")
    for parts in computed(name, case, "token"):
        assert all(np.isfinite(part).all() for part in parts.values())


def test_strong_decay_that_all_keys_share_neither_overflows_nor_divides_by_zero():
    assert_agree("exact", replace(SHARED, weakest=-50), "chunked")


@pytest.mark.parametrize("name", ["exact", "diagonal", "additive"])
def test_strong_decay_is_finite_in_float32(name):
    case = replace(FULL, starts=(70,), weakest=-50)
    for parts in computed(name, case, "chunked", "float32"):
        assert all(np.isfinite(part).all() for part in parts.values())


@pytest.mark.parametrize(("end", "of"), [("restored 0", "reset"), ("restored 1", "exact")])
def test_ends_of_the_dial_are_reset_and_exact(end, of):
    case = replace(FULL, starts=(70,))
    found, expected = (computed(name, case, "chunked", "float32")[0] for name in (end, of))
    names = ("outputs", "variances", "log evidence", "last mean")
    assert_close(*({name: part[name] for name in names} for part in (found, expected)), 1e-5)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "reset", "restored 0", "diagonal", "additive"])
def test_float32_is_float64_to_rounding(name):
    """Values within eps·time/20, gradients within eps·time²/200, of their largest entry or of 1.

    The worst seen: 0.016 eps·time (read-outs at λ = 0), 0.0011 eps·time² (λ at λ = 0).
    """
    case = replace(FULL, starts=(70,))
    rounded, exact = (computed(name, case, "chunked", dtype) for dtype in ("float32", "float64"))
    eps = np.finfo(np.float32).eps
    assert_close(rounded[0], exact[0], eps * case.time / 20)
    assert_close(rounded[1], exact[1], eps * case.time**2 / 200)


def test_bfloat16_inputs_are_close_to_float32():
    stream = draw_stream(Case(150, key=16, value=8, drift="scalar"), dtype="float32")
    rounded = replace(
        stream, **{n: getattr(stream, n).astype("bfloat16") for n in ("key", "value", "query")}
    )
    same = jax.tree.map(lambda part: part.astype("float32"), rounded)

    @partial(jax.jit, static_argnums=1, compiler_options=FAST)
    def scan(stream, dtype):
        return filter_scan(stream, 0.9, dtype=dtype)

    found, expected = scan(rounded, "bfloat16"), scan(same, "float32")
    for part, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.isfinite(part).all()
        assert jnp.abs(part - reference).max() <= 2e-2 * jnp.abs(reference).max()
