"""Kernels against the filter token by token in float64: in the simulator, lowered, and on a GPU."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from scan_cases import Case, draw_initial, draw_stream

from layers import communication, elements, exchange, sharded
from layers.kernels import (
    device_refusal,
    kept_whole,
    kernel_scan,
    mosaic,
    refusal,
    reverse,
    segments,
)
from layers.kernels.blocks import rates
from layers.kernels.elements import Element
from layers.kernels.joining import join_ends, join_starts
from layers.kernels.matrices import Numbers
from layers.kernels.sweep import sweep
from layers.rules import Diagonal, Exact, Restored
from layers.scans import filter_scan
from layers.sharded import sharded_scan
from layers.stream import Belief, Stream

PRIOR = 0.9
EXACT = Exact()
VECTORS = ("key", "value", "query")
STATES = ("mean", "covariance")
TOLERANCES = {
    "float32": {"values": 1e-4, "gradients": 1e-3},
    # A gradient is rounded as its argument is: 2⁻⁹ of each entry at most.
    "bfloat16": {"values": 1e-4, "gradients": 4e-3},
}
"""Relative errors, of each array by its norm. Inputs are rounded before they are compared."""


def draw(case: Case, dtype: str, dial=None) -> tuple[dict, jax.Array | None]:
    """Every differentiable input in float32, or rounded to bfloat16, and documents' starts.

    `dial` is the restoration of a `Restored` rule, one number or one a token.
    """
    stream = draw_stream(case, dtype="float32")
    mean, covariance = draw_initial(Exact(), case.key, case.value)
    named = {name: getattr(stream, name) for name in (*VECTORS, "noise", "log_decay", "drift")}
    named |= {"prior": jnp.float32(PRIOR), "mean": mean, "covariance": covariance}
    if dial is not None:
        named |= {"restoration": jnp.asarray(dial), "restored variance": jnp.float32(0.8)}
    cast = {
        name: jnp.asarray(part, dtype if name in VECTORS else "float32")
        for name, part in named.items()
        if part is not None
    }
    return cast, stream.starts


def outputs(arguments: dict, starts, form) -> dict:
    """Every output of one head, by name."""
    rates = {name: arguments.get(name) for name in ("log_decay", "drift")}
    stream = Stream(*(arguments[name] for name in (*VECTORS, "noise")), **rates, starts=starts)
    covariance = (arguments["covariance"] + arguments["covariance"].T) / 2
    rule = Exact()
    if "restoration" in arguments:
        rule = Restored(arguments["restoration"], arguments["restored variance"])
    last, reading = form(stream, Belief(arguments["mean"], covariance), arguments["prior"], rule)
    named = {"last mean": last.mean, "last covariance": last.covariance}
    return named | {
        "outputs": reading.mean,
        "variances": reading.variance,
        "log evidence": reading.log_evidence,
    }


def by_token(stream, initial, prior, rule=EXACT):
    return filter_scan(stream, prior, rule, initial=initial, algorithm="token")


def over_devices(mesh: Mesh | AbstractMesh):
    def form(stream, initial, prior, rule=EXACT):
        return sharded_scan(stream, prior, rule, initial=initial, mesh=mesh)

    return form


def simulated(stream, initial, prior, rule=EXACT):
    return kernel_scan(stream, initial, prior, rule, interpret=True)


def weigh(parts: dict) -> jax.Array:
    """One number that every entry of every output moves in its own way."""
    total = jnp.zeros(())
    for name, part in sorted(parts.items()):
        weights = np.random.default_rng(len(name)).normal(size=part.shape)
        if name == "last covariance":
            weights = (weights + weights.T) / 2
        total = total + jnp.sum(part * jnp.asarray(weights, part.dtype))
    return total


def differentiated(form):
    def objective(arguments, starts):
        parts = outputs(arguments, starts, form)
        return weigh(parts), parts

    return lambda *inputs: jax.grad(objective, has_aux=True)(*inputs)


@cache
def compiled(form):
    return jax.jit(differentiated(form))


def expected(arguments: dict, starts) -> tuple[dict, dict]:
    """Gradients and outputs of the definition in float64, of the same rounded inputs."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        starts = None if starts is None else jnp.asarray(np.asarray(starts))
        exact = {
            name: jnp.asarray(np.asarray(part, np.float64)) for name, part in arguments.items()
        }
        return jax.tree.map(np.asarray, compiled(by_token)(exact, starts))


def errors(found: dict, reference: dict) -> dict[str, float]:
    assert found.keys() == reference.keys()
    return {
        name: float(
            np.linalg.norm(np.asarray(found[name], np.float64) - part)
            / max(np.linalg.norm(part), 1e-30)
        )
        for name, part in reference.items()
    }


def assert_within(found: tuple[dict, dict], reference: tuple[dict, dict], dtype: str, slack=1.0):
    gradients, values = (errors(*pair) for pair in zip(found, reference, strict=True))
    limits = TOLERANCES[dtype]
    for kind, worst in (("values", values), ("gradients", gradients)):
        over = {name: error for name, error in worst.items() if not error <= slack * limits[kind]}
        assert not over, f"{kind} {over}"


# -- without a GPU ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "time"),
    [
        ("bfloat16", 66),
        pytest.param("bfloat16", 130, marks=pytest.mark.exhaustive),
        pytest.param("float32", 75, marks=pytest.mark.exhaustive),
    ],
)
def test_simulated_values_and_gradients_are_the_definition(dtype, time, monkeypatch, capfd):
    """The last chunk is padded; documents start inside a block and at a chunk's edge."""
    monkeypatch.setattr(mosaic, "PROCESSORS", 1)  # so that one program goes through all chunks
    case = Case(time, 64, 64, decay="scalar", drift="scalar", starts=(20, 64))
    arguments, starts = draw(case, dtype)
    found = differentiated(simulated)(arguments, starts)  # jit can deadlock the simulator
    assert_within(found, expected(arguments, starts), dtype)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.exhaustive  # rows are mapped where heads write twice a token, too
def test_simulated_values_of_128_rows_and_their_gradients_are_the_definition():
    case = Case(20, 64, 128, decay="scalar", drift="scalar", starts=(3,))
    arguments, starts = draw(case, "bfloat16")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "bfloat16")


@pytest.mark.exhaustive
def test_simulated_values_of_keys_128_wide_and_their_gradients_are_the_definition():
    case = Case(9, 128, 64, decay="scalar", drift="scalar", starts=(3,))
    arguments, starts = draw(case, "bfloat16")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "bfloat16")


@pytest.mark.exhaustive  # test_simulated_beliefs_pass... has its algebra
def test_what_enters_a_simulated_segment_is_the_definition(capfd):
    """The second of two chunks, and how the first passes on changes of what entered it."""
    arguments, _ = draw(Case(128, 64, 64, decay="scalar", drift="scalar"), "bfloat16")
    key, value, noise, log_decay, drift, mean, covariance = (
        arguments[name][None] for name in (*VECTORS[:2], "noise", "log_decay", "drift", *STATES)
    )
    given = rates(noise, log_decay, jnp.zeros(noise.shape, bool), drift)
    covariances, means, loops = segments.starts(
        key, value, given, covariance, mean, 2, interpret=True
    )
    half = {name: arguments[name][:64] for name in (*VECTORS, "noise", "log_decay", "drift")}

    def after_half(mean, covariance):
        initial = Belief(mean, covariance)
        last, _ = by_token(Stream(**half), initial, PRIOR)
        return last.mean, last.covariance

    with jax.enable_x64(True):
        half = jax.tree.map(lambda part: part.astype("float64"), half)
        states = [arguments[name].astype("float64") for name in STATES]
        change = jnp.asarray(np.random.default_rng(2).normal(size=(64, 64)))
        change = change + change.T
        of_mean = jax.jit(lambda *of: jax.jvp(after_half, states, list(of))[1])
        exact = jax.jit(after_half)(*states)
        by_mean, _ = of_mean(change, jnp.zeros_like(change))
        by_covariance, _ = of_mean(jnp.zeros_like(change), change)
        closed, crossed = (part[0, 0].astype("float64") for part in loops)
        found = {"mean": means[0, 1], "covariance": covariances[0, 1]}
        found |= {"by mean": change @ closed, "by covariance": crossed @ change @ closed}
        right = (np.asarray(part) for part in (*exact, by_mean, by_covariance))
        reference = dict(zip(found, right, strict=True))
    assert max(errors(found, reference).values()) < 2e-5
    assert "RACE" not in capfd.readouterr().out


def test_a_simulated_sweep_finds_what_the_whole_recursion_finds_for_the_start(capfd):
    """Of numbers drawn at random, a document's start among them."""
    rng = np.random.default_rng(0)

    def drawn(*shape, dtype="float32"):
        return jnp.asarray(0.3 * rng.normal(size=shape), dtype)

    token, pieces = (1, 64), (1, 1, 2, 64, 64)
    document = jnp.asarray(np.arange(64) >= 40, "float32")[None]
    alpha = jnp.where(document > 0, 0, jnp.abs(drawn(*token)))
    positive = [jnp.abs(drawn(*token)) for _ in range(5)]
    numbers = Numbers(-jnp.cumsum(positive[0], axis=1), document, alpha, *positive)
    found = [drawn(*pieces, dtype="bfloat16") for _ in range(3)]
    found += [drawn(1, 1, 64, 64) for _ in range(2)]
    tokens = [drawn(1, 1, 64, 64, dtype="bfloat16") for _ in range(2)]
    asked = *tokens, drawn(1, 64, 64), numbers.by_chunk(), tuple(found)
    lasts = drawn(1, 64, 64), drawn(1, 64, 64)
    states = (drawn(*pieces, dtype="bfloat16") for _ in range(2))
    whole = reverse.recur(*asked, *states, *lasts, interpret=True)
    mean, covariance = sweep(*asked, *lasts, interpret=True)
    np.testing.assert_array_equal(mean, whole["first_mean"])
    np.testing.assert_array_equal(covariance, whole["first_covariance"])
    assert "RACE" not in capfd.readouterr().out


def test_simulated_beliefs_pass_through_segments_as_defined(capfd):
    """Two of two rows, by elements drawn at random; what enters one fades to nothing."""
    rng = np.random.default_rng(0)
    rows, parts = 2, 3
    moved, added_mean, evidence, root = rng.normal(size=(4, rows, parts, 64, 64)) / 8
    added, covariance = (part @ part.swapaxes(-1, -2) for part in (moved / 2, added_mean[:, 0]))
    moved[1, 1], root[1, 1], evidence[1, 1] = 1e-42, 0, 1e-42
    mean, information = rng.normal(size=(rows, 64, 64)) / 8, root.swapaxes(-1, -2) @ root
    element = Element(moved, added_mean, added, evidence, information)

    def single(array):
        return jnp.asarray(array.reshape(-1, 64, 64), "float32")

    given = jax.tree.map(single, (element, root, covariance, mean))
    found = join_starts(*given, parts, interpret=True)
    covariances, means, closed, informed = [covariance], [mean], [], []
    for part in range(parts - 1):
        shrunk = np.linalg.inv(np.eye(64) + information[:, part] @ covariances[-1])
        posterior = covariances[-1] @ shrunk
        informed.append(means[-1] @ shrunk + evidence[:, part] @ posterior)
        closed.append(shrunk @ moved[:, part])
        means.append(informed[-1] @ moved[:, part] + added_mean[:, part])
        turned = moved[:, part].swapaxes(-1, -2) @ posterior
        covariances.append(turned @ moved[:, part] + added[:, part])
    for part, reference in zip(found, (covariances, means, closed, informed), strict=True):
        whole = np.stack(reference, axis=1)
        assert np.linalg.norm(part - whole) < 2e-5 * np.linalg.norm(whole)
    assert "RACE" not in capfd.readouterr().out


def test_information_of_almost_nothing_has_no_root():
    """Near the smallest numbers it is no definite matrix, of which a root would be no number."""
    root = np.random.default_rng(0).normal(size=(64, 64)) / 8
    information = np.asarray([1e-25, 1e-36])[:, None, None] * (root.T @ root)
    some, none = segments.roots(jnp.asarray(information, "float32"), interpret=True)
    some = np.asarray(some, np.float64)
    gap = np.linalg.norm(some.T @ some - information[0])
    assert gap < 1e-4 * np.linalg.norm(information[0])
    assert not np.any(none)


def test_simulated_cotangents_pass_through_segments_as_defined(capfd):
    """Four of two rows, by numbers drawn at random; places of more segments stay empty."""
    rng = np.random.default_rng(0)
    rows, parts = 2, 4
    own_mean, own_covariance = 0.3 * rng.normal(size=(2, rows, parts, 64, 64))
    last_mean, last_covariance = 0.3 * rng.normal(size=(2, rows, 64, 64))
    loops = np.zeros((2, rows, 5, 64, 64))
    loops[:, :, : parts - 1] = 0.1 * rng.normal(size=(2, rows, parts - 1, 64, 64))
    own_covariance, last_covariance = (
        part + part.swapaxes(-1, -2) for part in (own_covariance, last_covariance)
    )
    given = [own_mean.reshape(-1, 64, 64), own_covariance.reshape(-1, 64, 64), *loops]
    given = [jnp.asarray(part, "float32") for part in (*given, last_mean, last_covariance)]
    found = join_ends(*given, parts, interpret=True)
    means, covariances = [last_mean, own_mean[:, -1]], [last_covariance, own_covariance[:, -1]]
    for part in range(parts - 2, 0, -1):
        closed, crossed = loops[:, :, part]
        faded = means[-1] @ closed.swapaxes(1, 2)
        turned = crossed.swapaxes(1, 2) @ faded
        kept = closed @ covariances[-1] @ closed.swapaxes(1, 2)
        means.append(faded + own_mean[:, part])
        of_covariance = kept + (turned + turned.swapaxes(1, 2)) / 2
        covariances.append(of_covariance + own_covariance[:, part])
    for part, reference in zip(found, (means, covariances), strict=True):
        whole = np.stack(reference[::-1], axis=1).reshape(-1, 64, 64)
        assert np.linalg.norm(part - whole) < 2e-5 * np.linalg.norm(whole)
    assert "RACE" not in capfd.readouterr().out


FALLING = np.linspace(1, 0, 20, dtype="float32")
"""Restoration from exact to reset."""


def test_a_simulated_restoration_and_its_gradients_are_the_definition():
    case = Case(20, 64, 64, decay="scalar", drift="scalar", starts=(3,))
    arguments, starts = draw(case, "float32", FALLING)
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")


@pytest.mark.exhaustive
@pytest.mark.parametrize("keys", [64, 96])
def test_a_simulated_restoration_across_chunks_is_the_definition(keys, monkeypatch, capfd):
    monkeypatch.setattr(mosaic, "PROCESSORS", 1)
    case = Case(75, keys, 64, decay="scalar", drift="scalar", starts=(20, 64))
    arguments, starts = draw(case, "float32", np.linspace(1, 0, 75, dtype="float32"))
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.exhaustive
def test_simulated_rates_per_key_and_their_gradients_are_the_definition(capfd):
    case = Case(20, 64, 64, decay="key", drift="key", starts=(3,))
    arguments, starts = draw(case, "float32")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.parametrize(("segments_each", "start"), [(1, 40), (2, 200)])
def test_a_simulated_sequence_over_devices_is_the_definition(segments_each, start, monkeypatch):
    """A row a device, since the simulator runs on one; documents cross borders."""
    devices = 1 + segments_each
    monkeypatch.setattr(segments, "most", lambda chunks, tree=False: segments_each)
    monkeypatch.setattr(segments, "FEWEST", 2)
    time = 64 * segments_each * devices
    case = Case(time, 64, 64, decay="scalar", drift="scalar", starts=(start,))
    arguments, starts = draw(case, "bfloat16")
    gradients, values = expected(arguments, starts)
    by_token = {"key", "value", "query", "noise", "log_decay", "drift"}

    def by_device(tree):
        return jax.tree.map(lambda part: part.reshape(devices, -1, *part.shape[1:]), tree)

    def told(shared, parts, starts):
        def form(stream, initial, prior, rule):
            return kernel_scan(stream, initial, prior, rule, axis="sequence", interpret=True)

        return outputs(shared | parts, starts, form)

    def device(shared, parts, starts, weights):
        found, pull = jax.vjp(lambda *given: told(*given, starts), shared, parts)
        return found, *pull(weights)

    weights = jax.grad(weigh)(jax.tree.map(lambda part: jnp.asarray(part, "float32"), values))
    lasts = {name: weights.pop(name) for name in ("last mean", "last covariance")}
    before = [(0, 0), (0, 0)]
    weights = by_device(weights) | {
        name: jnp.pad(part[None], [(devices - 1, 0), *before]) for name, part in lasts.items()
    }
    shared = {name: part for name, part in arguments.items() if name not in by_token}
    parts = by_device({name: part for name, part in arguments.items() if name in by_token})
    mapped = jax.vmap(device, in_axes=(None, 0, 0, 0), axis_name="sequence")
    found, of_shared, of_parts = jax.jit(mapped)(shared, parts, by_device(starts), weights)
    joined = {name: part.reshape(-1, *part.shape[2:]) for name, part in (found | of_parts).items()}
    for name in lasts:
        joined[name] = found[name][-1]
    joined |= {name: part.sum(axis=0) for name, part in of_shared.items()}
    both = ({name: joined[name] for name in part} for part in (gradients, values))
    assert_within(tuple(both), (gradients, values), "bfloat16")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("dtype", "other"), [("float32", {}), ("bfloat16", {}), ("float32", {"weakest": -50.0})]
)
def test_simulated_segments_and_their_gradients_are_the_definition(
    dtype, other, monkeypatch, capfd
):
    """Three, of one chunk each; documents start in the second, which forgets what entered."""
    monkeypatch.setattr(segments, "most", lambda chunks, tree=False: 3)
    case = Case(150, 64, 64, decay="scalar", drift="scalar", starts=(70,), **other)
    arguments, starts = draw(case, dtype)
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), dtype)
    assert "RACE" not in capfd.readouterr().out


def dense_blocks(key, value, query, rates, covariance, mean, **named):
    """`filter_blocks` of tokens that neither decay nor drift, whose values are 0, by a factor."""
    factor = jnp.linalg.cholesky(
        key @ covariance @ key.mT + rates.noise[:, :, None] * jnp.eye(key.shape[1])
    )
    moved, surprise = (jnp.linalg.solve(factor, key @ part) for part in (covariance, mean.mT))
    return {
        "whitened": jnp.concatenate([moved, -surprise], axis=2),
        "last_covariance": covariance - moved.mT @ moved,
        "last_mean": mean - surprise.mT @ moved,
    }


def test_segments_in_a_tree_do_and_ask_what_they_do_in_turn(monkeypatch):
    """In float64: elements, what they make of a belief, and its derivative."""
    monkeypatch.setattr(segments, "filter_blocks", dense_blocks)
    monkeypatch.setattr(segments, "ROOT_NOISE", 1e-13)
    rng = np.random.default_rng(0)
    rows, count, width = 2, 5, 64
    with jax.enable_x64(True):

        def drawn():
            return jnp.asarray(rng.normal(size=(rows, count, width, width)) / width**0.5)

        def definite():
            root = drawn()
            return root @ root.mT + 0.1 * jnp.eye(width)

        each = Element(drawn(), drawn(), definite(), drawn(), definite())
        mean, covariance = drawn()[:, 0], definite()[:, 0]
        of_mean, of_covariance = drawn(), definite()

        def in_turn(mean, covariance):
            """What enters every segment."""
            states = []
            for place in range(count):
                states.append((mean, covariance))
                moved, *rest = (part[:, place] for part in each)
                part = elements.Element(moved.mT, *rest)
                mean, covariance = elements.apply(part, mean, covariance)
            return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *states)

        @jax.jit
        def by_tree(mean, covariance):
            until = segments.running(each, segments.combined)
            covariances, means = segments.begun(until, covariance, mean, count)
            loops = segments.loops_of(each, covariances, means)
            asked = segments.Asked(*loops, of_mean, of_covariance)
            asked = segments.running(asked, lambda later, own: own.before(later), backwards=True)
            return (means, covariances), (asked.of_mean[:, 0], asked.of_covariance[:, 0])

        entering, pull = jax.vjp(jax.jit(in_turn), mean, covariance)
        found = by_tree(mean, covariance)
        of_start = pull((of_mean, of_covariance))
        reference = entering, (of_start[0], (of_start[1] + of_start[1].mT) / 2)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-9 * np.abs(other).max())


def test_the_compiler_does_not_know_one_decay_for_all_tokens():
    """On a GPU it would find their cumulative sums, for which it takes half a minute."""

    def both():
        decay, never = jnp.full((4, 256), -0.1), jnp.zeros((4, 256), bool)
        return rates(decay, decay, never, decay)

    assert "optimization_barrier" in jax.jit(both).lower().as_text()
    found = both()
    np.testing.assert_allclose(found.alpha[0, :16], np.exp(-0.1 * np.arange(1, 17)), rtol=1e-6)


def test_how_many_segments_a_sequence_is_cut_into():
    """One wave of programs on 132 multiprocessors; few where joining them would take longer."""
    assert segments.count(rows=16, chunks=512) == 8
    assert segments.count(rows=128, chunks=64) == 1
    assert segments.count(rows=1, chunks=512) == 16
    assert segments.count(rows=16, chunks=4) == 1
    assert segments.count(rows=4, chunks=1024) == 16
    assert segments.count(rows=4, chunks=1024, tree=True) == 32
    for time in (1, 64, 65, 4096, 4097, 12345, 32769, 100003):
        padded = segments.padded(time)
        assert padded % 64 == 0
        assert 0 <= padded - time < 64 + time / 32
        if time > 2000:
            assert segments.count(rows=16, chunks=padded // 64) >= 3


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case",
    [
        Case(75, 64, 64, decay="key", drift="key", starts=(20, 64)),
        Case(75, 24, 40, decay="key", drift="scalar", weakest=-50.0),
    ],
)
def test_simulated_rates_per_key_across_chunks_are_the_definition(case, capfd):
    arguments, starts = draw(case, "float32")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.exhaustive
def test_simulated_keys_of_more_than_64_and_their_gradients_are_the_definition(monkeypatch, capfd):
    monkeypatch.setattr(mosaic, "PROCESSORS", 1)
    case = Case(75, 96, 128, decay="scalar", drift="scalar", starts=(20, 64))
    arguments, starts = draw(case, "float32")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.exhaustive
def test_simulated_values_of_a_narrow_memory_and_their_gradients_are_the_definition():
    case = Case(20, 24, 40, decay="scalar", drift="scalar", starts=(3,))
    arguments, starts = draw(case, "float32")
    found = differentiated(simulated)(arguments, starts)
    assert_within(found, expected(arguments, starts), "float32")


def test_simulated_heads_that_write_twice_a_token_are_mapped():
    arguments, _ = draw(Case(9, 24, 40, observations=2), "bfloat16")
    stream = Stream(*(arguments[name] for name in (*VECTORS, "noise")))
    initial = Belief(arguments["mean"], arguments["covariance"])
    heads = jax.tree.map(lambda part: jnp.stack([part, part / 2]), stream)
    _, found = jax.vmap(lambda head: simulated(head, initial, PRIOR))(heads)
    for head, scale in enumerate((1, 2)):
        alone = jax.tree.map(lambda part, scale=scale: part.astype("float32") / scale, stream)
        _, reference = jax.jit(by_token)(alone, initial, PRIOR)
        for part, other in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(part[head], other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("keys", "dtype", "dial"),
    [
        (64, "bfloat16", False),
        (64, "float32", True),
        (128, "bfloat16", False),
        (128, "float32", True),
        *(
            pytest.param(keys, *kind, marks=pytest.mark.exhaustive)
            for keys in (64, 128)
            for kind in (("float32", False), ("bfloat16", True))
        ),
    ],
)
def test_kernels_lower_for_cuda(keys, dtype, dial):
    """The whole gradient, and so all its kernels; also alone, which saves no states.

    Lowering fails where shared memory is short, and where a transfer has no layout. A restoration
    takes more of it. Float32 streams lower where float64 is enabled, too.
    """
    case = Case(200, keys, 64, decay="scalar", drift="scalar", starts=(7,))
    with jax.enable_x64(dtype == "float32"):
        assert lowered(case, dtype, 0.5 if dial else None) == (3 + dial, 1)


def test_kernels_of_rates_per_key_lower_for_cuda():
    case = Case(200, 64, 64, decay="key", drift="key", starts=(7,))
    with jax.enable_x64(True):
        assert lowered(case, "float32") == (6, 2)


def test_layers_that_are_alike_share_their_kernels():
    def both(arguments, starts):
        first = outputs(arguments, starts, kernel_scan)
        value = arguments["value"] + first["outputs"]
        return first, outputs(arguments | {"value": value}, starts, kernel_scan)

    case = Case(200, 64, 64, decay="scalar", drift="scalar", starts=(7,))
    assert kernels_of(both, *draw(case, "float32")) == 1


HOPPER = AbstractDevice("NVIDIA H200", mosaic.PROCESSORS, "gpu")
"""A GPU for which programs can be lowered where there is none."""


def lowering_mesh():
    """A context in which programs are lowered for that device."""
    mesh = AbstractMesh((), (), abstract_device=HOPPER)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(case: Case, dtype: str, dial=None) -> tuple[int, int]:
    """How many kernels the gradient, and the filter alone, lower to."""
    forms = differentiated(kernel_scan), lambda *inputs: outputs(*inputs, kernel_scan)
    gradient, alone = (kernels_of(form, *draw(case, dtype, dial)) for form in forms)
    return gradient, alone


def kernels_of(function, arguments: dict, starts) -> int:
    """How many kernels a function of heads lowers to."""
    heads = jax.tree.map(lambda part: jnp.stack([part] * 2), arguments)
    mapped = jax.jit(jax.vmap(lambda head: function(head, starts)))
    with lowering_mesh():
        text = mapped.trace(heads).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("mosaic_gpu_v2")


def test_kernels_that_join_segments_lower_for_cuda():
    segment, row = (jnp.zeros((number, 64, 64)) for number in (6, 2))
    loop = jnp.zeros((2, 2, 64, 64))

    def join(segment, row, loop):
        entering = join_starts(Element(*[segment] * 5), segment, row, row, 3)
        return entering, join_ends(segment, segment, loop, loop, row, row, 3)

    with lowering_mesh():
        program = jax.jit(join).trace(segment, row, loop)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.exhaustive  # these kernels are those of the tests beside it
def test_segments_lower_for_cuda(monkeypatch):
    """Three of two chunks: five kernels more, of which two join them."""
    monkeypatch.setattr(segments, "most", lambda chunks, tree=False: 3)
    arguments, starts = draw(Case(350, 64, 64, decay="scalar", drift="scalar"), "bfloat16")
    with lowering_mesh():
        lowered = jax.jit(differentiated(kernel_scan)).trace(arguments, starts)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 8


@pytest.mark.parametrize("segments_each", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_sequence_over_devices_lowers_for_cuda(segments_each, monkeypatch):
    """Joining, of two kernels, is in each of four places, of which one has segments alone."""
    monkeypatch.setattr(segments, "most", lambda chunks, tree=False: segments_each)
    monkeypatch.setattr(sharded, "device_refusal", lambda: None)
    case = Case(2 * 3 * 64, 64, 64, decay="scalar", drift="scalar", starts=(7,))
    arguments, starts = draw(case, "bfloat16")
    mesh = AbstractMesh((2,), ("sequence",), (AxisType.Auto,), abstract_device=HOPPER)
    program = jax.jit(differentiated(over_devices(mesh))).trace(arguments, starts)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 9 + (4 if segments_each > 1 else 0)
    sent = re.findall(r"all_gather.*x(\d+)xf32>\) ->", text)
    element = communication.predicted(EXACT, 2, value=64, key=64).numbers
    assert sent == [str(element), str(element - 64**2)]


@pytest.mark.parametrize("dial", [None, 0.5])
def test_kernels_of_float32_hold_no_float64_where_it_is_enabled(dial, monkeypatch):
    """Nor what joins parts over devices; a restored sequence is held by one."""
    monkeypatch.setattr(sharded, "device_refusal", lambda: None)
    arguments, starts = draw(Case(128, 64, 64, decay="scalar", drift="scalar"), "float32", dial)
    mesh = AbstractMesh((2,), ("sequence",), (AxisType.Auto,), abstract_device=HOPPER)
    form = kernel_scan if dial else over_devices(mesh)
    with jax.enable_x64(True), lowering_mesh():
        program = jax.jit(differentiated(form)).trace(arguments, starts)
    assert not re.search(r"f64\[\d", str(program.jaxpr))


FITTING = Case(20, 64, 64, decay="scalar", drift="scalar", starts=(3,))
UNFIT = {
    "rule": (FITTING, {"rule": Diagonal()}),
    "algorithm": (FITTING, {"algorithm": "parallel"}),
    "memory": (replace(FITTING, value=80), {}),
    "memory wider": (replace(FITTING, key=136), {}),
    "no tokens": (Case(0, 64, 64), {}),
    "log_decay": (replace(FITTING, key=72, decay="key"), {}),
    "drift": (replace(FITTING, key=72, drift="key"), {}),
    "drift restored": (replace(FITTING, drift="key"), {"rule": Restored(jnp.asarray(0.5))}),
    "prior_variance": (replace(FITTING, key=72), {"prior_variance": jnp.ones(72)}),
}


def refused(case: Case, rule=None, algorithm="chunked", prior_variance=PRIOR, dtype="float32"):
    stream = draw_stream(case, dtype=dtype)
    initial = Belief(jnp.zeros((case.value, case.key)), jnp.eye(case.key))
    return refusal(stream, initial, prior_variance, rule or Exact(), algorithm)


@pytest.mark.parametrize("name", UNFIT)
def test_what_kernels_do_not_cover_is_refused_by_name(name):
    case, other = UNFIT[name]
    assert name.split()[0] in refused(case, **other)


def test_float64_is_refused():
    with jax.enable_x64(True):
        assert "float64" in refused(FITTING, dtype="float64")


def test_what_kernels_cover_is_not_refused():
    longer, wider = replace(FITTING, time=1000), replace(FITTING, value=128, observations=2)
    for case in (FITTING, Case(1, 8, 16), longer, wider, replace(wider, key=128)):
        assert refused(case) is None
        assert refused(case, dtype="bfloat16") is None
        assert refused(case, rule=Restored(jnp.asarray(0.5, "float32"))) is None
    assert refused(replace(wider, decay="key")) is None
    assert refused(replace(wider, drift="key"), dtype="bfloat16") is None
    assert refused(FITTING, prior_variance=jnp.ones(64)) is None


def test_maps_of_parts_that_kernels_do_not_find_are_left_to_xla():
    """Restored, of many keys, of rates per key, and where nothing fades: too few digits."""
    dial = Restored(jnp.asarray(0.5))
    fading = replace(FITTING, drift="none")
    whole = [(replace(fading, decay="none"), EXACT), (replace(FITTING, key=72), EXACT)]
    whole += [(FITTING, dial), (replace(FITTING, drift="key"), EXACT)]
    for case, rule in whole:
        assert kept_whole(draw_stream(case, dtype="float32"), PRIOR, rule)
    for case in (FITTING, fading, replace(FITTING, decay="none", value=128, observations=2)):
        assert not kept_whole(draw_stream(case, dtype="float32"), PRIOR, EXACT)


@pytest.mark.skipif(device_refusal() is None, reason="this device takes kernels")
def test_asking_for_kernels_on_another_device_is_one_clear_error():
    stream = draw_stream(FITTING, dtype="float32")
    with pytest.raises(
        ValueError, match=r'`backend` is "mosaic", but the device is .*Hopper.*auto'
    ):
        filter_scan(stream, PRIOR, backend="mosaic")


def test_an_unknown_backend_is_refused():
    stream = draw_stream(FITTING, dtype="float32")
    with pytest.raises((ValueError, TypeError), match="cuda"):
        filter_scan(stream, PRIOR, backend="cuda")  # pyright: ignore[reportArgumentType]


# -- on a GPU -----------------------------------------------------------------------------------

LENGTHS = (1, 15, 63, 64, 65, 130, 1000)
FULL = Case(300, 64, 64, decay="scalar", drift="scalar", starts=(7, 70, 71, 128))


WIDE = replace(FULL, key=128, value=128)
PER_KEY = replace(FULL, decay="key", drift="key")


def assert_on_gpu(arguments, starts, dtype, slack=1.0):
    """Values and every gradient; and twice, with equal bits."""
    found, again = (compiled(kernel_scan)(arguments, starts) for _ in range(2))
    for part, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(part, other)
    assert_within(found, expected(arguments, starts), dtype, slack)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("keys", [64, 128])
def test_every_length_on_a_gpu(keys, time, dtype):
    assert_on_gpu(*draw(Case(time, keys, 64, decay="scalar", drift="scalar"), dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "case",
    [
        FULL,
        replace(FULL, decay="none"),
        replace(FULL, drift="none"),
        Case(100, 64, 64),
        Case(100, 64, 128, decay="scalar", drift="scalar", starts=(9,), observations=2),
        Case(100, 24, 40, decay="scalar", drift="scalar", starts=(9,)),
        WIDE,
        replace(WIDE, decay="none"),
        replace(WIDE, value=64, drift="none"),
        Case(100, 72, 128, decay="scalar", drift="scalar", starts=(9,), observations=2),
        PER_KEY,
        replace(PER_KEY, drift="none"),
        replace(PER_KEY, value=128, decay="none"),
        Case(1, 64, 64, decay="key", drift="scalar"),
        Case(100, 24, 40, decay="scalar", drift="key", starts=(9,), observations=2),
    ],
)
def test_documents_absent_rates_and_wide_values_on_a_gpu(case, dtype):
    assert_on_gpu(*draw(case, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("weakest", [-5.0, -50.0])
@pytest.mark.parametrize("case", [FULL, WIDE, PER_KEY])
def test_strong_decay_on_a_gpu(case, weakest, dtype):
    assert_on_gpu(*draw(replace(case, weakest=weakest), dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_decay_that_forgets_everything_on_a_gpu(dtype):
    """Log decays down to −1000: their own gradient is 1e-5 of the keys', and its error rounding."""
    arguments, starts = draw(replace(FULL, weakest=-1000.0), dtype)
    gradients, values = compiled(kernel_scan)(arguments, starts)
    exact, right = expected(arguments, starts)
    found = np.asarray(gradients.pop("log_decay"), np.float64)
    error = np.linalg.norm(found - exact.pop("log_decay"))
    assert error < 1e-5 * np.linalg.norm(exact["key"])
    assert_within((gradients, values), (exact, right), dtype)


LASTING = Case(192, 64, 64)
"""Nothing decays or drifts, so that every write counts until the end: the hardest for precision."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("case", "noise"),
    [
        (FULL, 1e-3),
        (FULL, 1e-2),
        (FULL, 1e2),
        (LASTING, 1e-1),
        (LASTING, 1e2),
        (PER_KEY, 1e-3),
        (PER_KEY, 1e2),
        (WIDE, 1e-3),
        (WIDE, 1e2),
        (replace(LASTING, key=128, value=128), 1e-1),
    ],
)
def test_extremes_of_noise_and_keys_alike_on_a_gpu(case, noise, dtype):
    """Keys of cosine 0.9, which leave the least to each innovation; noise times 0.1 to 1."""
    arguments, starts = draw(case, dtype)
    rng = np.random.default_rng(0)
    key = rng.normal(size=case.key) + 0.33 * rng.normal(size=(case.time, case.key))
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    arguments |= {"key": jnp.asarray(key, dtype), "noise": arguments["noise"] * noise}
    assert_on_gpu(arguments, starts, dtype)


LONG = Case(4096, 64, 64, decay="scalar", drift="scalar", starts=(7, 1030, 1031, 2048))
"""Long enough that a head alone is cut into segments."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("case", "noise"),
    [
        (LONG, 1.0),
        (replace(LONG, time=1500, value=128), 1.0),
        (replace(LONG, decay="none"), 1e-2),
        (replace(LONG, drift="none", weakest=-0.01, starts=()), 1.0),
        (replace(LONG, weakest=-50.0), 1.0),
        (replace(LONG, starts=()), 1e-3),
        (Case(2048, 24, 40, decay="scalar", drift="scalar"), 1e2),
    ],
)
def test_segments_on_a_gpu(case, noise, dtype):
    arguments, starts = draw(case, dtype)
    chunks = segments.padded(case.time) // 64
    assert segments.count(rows=-(-case.value // 64), chunks=chunks) >= 3
    arguments |= {"noise": arguments["noise"] * noise}
    assert_on_gpu(arguments, starts, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_segments_of_one_key_repeated_on_a_gpu(dtype):
    """All that a segment says of its start is along one direction."""
    arguments, starts = draw(replace(LONG, starts=()), dtype)
    arguments |= {"key": jnp.broadcast_to(arguments["key"][:1], (LONG.time, LONG.key))}
    assert_on_gpu(arguments, starts, dtype)


@pytest.mark.gpu
def test_segments_of_several_heads_on_a_gpu():
    """Cotangents mapped beside heads, which are more rows than were filtered."""
    arguments, starts = draw(LONG, "float32")
    heads = jax.tree.map(lambda part: jnp.stack([part, part / 2]), arguments)

    def both(heads):
        return jax.vmap(lambda head: outputs(head, starts, kernel_scan))(heads)

    found, pull = jax.vjp(both, heads)
    cotangents = jax.tree.map(lambda part: jnp.stack([part, -part, 2 * part]), found)
    (together,) = jax.jit(jax.vmap(pull))(cotangents)
    (alone,) = jax.jit(pull)(found)
    for part, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        for index, scale in enumerate((1, -1, 2)):
            gap = np.linalg.norm(np.asarray(part[index] - scale * other, np.float64))
            assert gap <= 1e-5 * max(np.linalg.norm(other), 1e-30)


@pytest.mark.gpu
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("gathered", [4, 1])
@pytest.mark.parametrize(
    "case",
    [
        FULL,
        LONG,
        replace(LONG, starts=(), weakest=-0.01),
        replace(LONG, decay="none"),
        replace(LONG, drift="none", weakest=-0.01, starts=()),
        replace(LONG, time=1500, value=128, observations=2),
        Case(2048, 24, 40, decay="scalar", drift="scalar"),
    ],
)
def test_a_sequence_over_gpus(case, gathered, dtype, monkeypatch):
    """Values and every gradient, by kernels alone; all GPUs, of which four divide every time."""
    monkeypatch.setattr(exchange, "GATHERED", gathered)
    devices = jax.devices()[: 4 if len(jax.devices()) >= 4 else 2]
    mesh = jax.make_mesh((len(devices),), ("sequence",), (AxisType.Auto,), devices=devices)
    arguments, starts = draw(case, dtype)
    program = jax.jit(differentiated(over_devices(mesh))).lower(arguments, starts)
    assert "mosaic_gpu" in program.as_text()
    assert "getrf" not in program.as_text()  # which elements in XLA need
    assert_within(program.compile()(arguments, starts), expected(arguments, starts), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "dial", [np.full(300, 1e-4, "float32"), 0.3, 1.0, np.linspace(1, 0, 300, dtype="float32")]
)
@pytest.mark.parametrize("case", [FULL, WIDE, replace(FULL, decay="none", drift="none")])
def test_restoration_on_a_gpu(case, dial, dtype):
    """One λ that resets most of all is asked token by token: its sum is 1/2000 of what it sums."""
    assert_on_gpu(*draw(case, dtype, dial), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [FULL, WIDE])
def test_a_restoration_of_0_has_its_derivative_on_a_gpu(case):
    """The memory's initial covariance then moves nothing."""
    arguments, starts = draw(case, "float32", 0.0)
    gradients, values = compiled(kernel_scan)(arguments, starts)
    exact, right = expected(arguments, starts)
    assert not np.any(exact.pop("covariance"))
    assert np.linalg.norm(gradients.pop("covariance")) < 1e-5 * np.linalg.norm(exact["key"])
    assert_within((gradients, values), (exact, right), "float32")


@pytest.mark.gpu
def test_automatic_choice_on_a_gpu_is_the_kernel():
    arguments, starts = draw(FULL, "float32")

    def automatic(stream, initial, prior, rule):
        return filter_scan(stream, prior, rule, initial=initial)

    assert "mosaic_gpu" in jax.jit(differentiated(automatic)).lower(arguments, starts).as_text()
