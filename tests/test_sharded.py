"""Sequences split over devices: the same numbers, what is sent, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from scan_cases import RULES, Case, draw_initial, draw_stream

from layers import communication, exchange
from layers.exchange import before
from layers.rules import Additive, Exact, Forget, Reset
from layers.scans import filter_scan
from layers.sharded import sharded_scan
from layers.stream import Belief

pytestmark = pytest.mark.xdist_group("sharded")

DEVICES, PART = min(4, jax.device_count()), 70
TIME = DEVICES * PART
BORDERS = tuple(start for start in (PART - 1, 2 * PART, 3 * PART - 5) if start < TIME)
"""Documents that start before, at and behind a border, and cross the next."""


def mesh_of(devices: int) -> Mesh:
    axis = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("sequence",), axis, devices=jax.devices()[:devices])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


CASES = {
    "exact": (Case(TIME, decay="scalar", drift="scalar", starts=BORDERS, weakest=-0.05), 1),
    "reset": (Case(TIME, decay="scalar", starts=BORDERS, observations=2), DEVICES),
    "restored by token": (Case(TIME, drift="scalar"), DEVICES),
    "additive": (Case(TIME, decay="key", drift="key", starts=BORDERS[2:]), 1),
}
"""Streams, and up to how many devices elements are gathered: here there are four, or a tree."""


RARER = pytest.param("restored by token", marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("name", ["exact", "reset", "additive", RARER])
def test_values_and_every_gradient_are_those_of_one_device(name, monkeypatch):
    case, gathered = CASES[name]
    monkeypatch.setattr(exchange, "GATHERED", gathered)
    mean, *covariance = draw_initial(RULES[name](TIME), case.key, case.value)
    weights = np.random.default_rng(3).normal(size=(TIME, case.value))

    def loss_of(scan, **named):
        def loss(stream, dial, prior, mean, covariance):
            rule = RULES[name](TIME)
            if name == "restored by token":
                rule = type(rule)(dial, rule.variance)
            covariance = [part + part.T for part in covariance if part.ndim == 2] or covariance
            start = Belief(mean, covariance[0] if covariance else None)
            last, reading = scan(stream, prior, rule, initial=start, **named)
            told = (
                jnp.sum(weights * reading.mean)
                + jnp.sum(weights[:, 0] * jnp.sin(reading.variance))
                + jnp.sum(weights[:, 1] * reading.log_evidence)
            )
            return told + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(last)), reading

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True, allow_int=True)
        return jax.jit(gradient)

    given = draw_stream(case), np.linspace(0, 1, TIME), 0.9, mean, covariance
    expected = loss_of(filter_scan, algorithm="token")(*given)
    found = loss_of(sharded_scan, mesh=mesh_of(DEVICES))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if one.dtype == np.float64:
            np.testing.assert_allclose(one, other, atol=1e-12 * TIME, rtol=1e-10)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("gathered", [1, DEVICES])
def test_what_comes_before_a_part_is_that_of_the_parts_before_in_order(
    gathered, backwards, monkeypatch
):
    monkeypatch.setattr(exchange, "GATHERED", gathered)
    rng = np.random.default_rng(0)
    maps, start = rng.normal(size=(DEVICES, 3, 3)), rng.normal(size=(1, 3))

    def part(own):
        follow = jnp.matmul  # which does not commute
        after = before(
            "sequence", own[0], follow, lambda one, now: now @ one, start, backwards=backwards
        )
        return after[None]

    along = PartitionSpec("sequence")
    split = jax.shard_map(
        part, mesh=mesh_of(DEVICES), in_specs=along, out_specs=along, check_vma=False
    )
    found, expected = jax.jit(split)(maps), [start]
    if backwards:
        found, maps = found[::-1], maps[::-1]
    for one in maps[:-1]:
        expected.append(expected[-1] @ one)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "gathered", "kind"),
    [
        (Exact(), 1, "collective-permute"),
        (Reset(), DEVICES, "all-gather"),
        (Additive(), 1, "collective-permute"),
    ],
)
def test_a_compiled_pass_sends_what_the_formulas_say(rule, gathered, kind, monkeypatch):
    for module in (exchange, communication):
        monkeypatch.setattr(module, "GATHERED", gathered)
    stream = draw_stream(Case(DEVICES * 16, key=8, value=6, drift="scalar"), dtype="float32")

    def outputs(stream):
        reading = sharded_scan(stream, 1.0, rule, mesh=mesh_of(DEVICES))[1]
        return reading.mean, reading.variance

    program = jax.jit(outputs).lower(stream).compile().as_text()
    traffic = communication.predicted(rule, DEVICES, value=6, key=8)
    found = communication.counted(program, DEVICES)
    assert found.keys() == {kind}
    messages, taken_in = found[kind]
    assert taken_in == 4 * traffic.numbers
    assert messages == traffic.rounds


@pytest.mark.parametrize(
    ("line", "taken_in"),
    [
        ("%a = (f32[5,64]{1,0}, f32[2,5,64]{2,1,0}) all-gather-start(%b)", 4 * 5 * 64),
        ("%a = ((f32[2,64]{1,0}), f32[64]{0}) reduce-scatter-start(%b)", 4 * 64),
        ("%a = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%b)", 4 * 64),
        ("%a = f32[64]{0} all-reduce-start(%b)", 4 * 64),
    ],
)
def test_messages_that_gpus_begin_are_counted_once(line, taken_in):
    (found,) = communication.counted(line, devices=2).values()
    assert found == (1, taken_in)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"axis": "time"}, "`axis` is 'time', and the mesh's axes are sequence"),
        ({"rule": Forget()}, "`rule` is Forget"),
        ({"stream": Case(31)}, f"`stream` has 31 tokens, no multiple of the {DEVICES} devices"),
        ({"mesh": None}, "the mesh's axes are none"),
    ],
)
def test_what_cannot_be_split_is_refused(wish, says):
    given = {"stream": Case(32), "mesh": mesh_of(DEVICES)} | wish
    with pytest.raises(ValueError, match=says):
        sharded_scan(**given | {"stream": draw_stream(given["stream"])})
