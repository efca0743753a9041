"""Whole NumPyro models as design models: the filter is that of the original's own log density."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density

from design_models import ModelError, from_scan
from inference.derivation import draft

V, K, STEPS = 3, 2, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def start():
    return numpyro.sample("start", dist.Normal(jnp.zeros((V, K)), 1.0).to_event(2))


def drift_on(memory, u):
    mean, scale = memory * u["decay"], jnp.sqrt(u["drift"])
    return numpyro.sample("memory", dist.Normal(mean, scale).to_event(2))


def read(memory, u):
    law = dist.Normal(memory @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
    numpyro.sample("value", law, obs=u["value"])


def memory_is_a_site(inputs):
    def step(memory, u):
        memory = drift_on(memory, u)
        read(memory, u)
        return memory, None

    scan(step, start(), inputs)


def memory_is_a_sum(inputs):
    def step(memory, u):
        write = dist.Normal(jnp.zeros((V, K)), jnp.sqrt(u["drift"])).to_event(2)
        memory = memory * u["decay"] + numpyro.sample("write", write)
        read(memory, u)
        return memory, None

    scan(step, start(), inputs)


def the_past_is_observed(inputs):
    """What is observed depends on the memory before the step, so it belongs to the transition."""

    def step(memory, u):
        read(memory, u)
        return drift_on(memory, u), None

    scan(step, start(), inputs)


def memory_never_moves(inputs):
    def step(memory, u):
        read(memory, u)
        return memory, None

    scan(step, start(), inputs)


def inputs_by_name(key, value, noise, decay, drift):
    memory_is_a_site({"key": key, "value": value, "noise": noise, "decay": decay, "drift": drift})


def inputs_as_arrays(inputs):
    def step(memory, moment):
        key, value, noise = moment
        read(memory, {"key": key, "value": value, "noise": noise})
        return memory, None

    scan(step, start(), (inputs["key"], inputs["value"], inputs["noise"]))


def tuple_of_memories(inputs):
    def step(memory, u):
        fast = drift_on(memory[0], u)
        read(fast + memory[1], u)
        return (fast, memory[1]), None

    slow = numpyro.sample("slow", dist.Normal(jnp.zeros((V, K)), 2.0).to_event(2))
    scan(step, (start(), slow), inputs)


MODELS = [
    memory_is_a_site,
    memory_is_a_sum,
    the_past_is_observed,
    memory_never_moves,
    inputs_by_name,
    inputs_as_arrays,
    tuple_of_memories,
]


def draw(rng, steps):
    """Inputs with names in the order in which models take them."""
    keys = jax.random.split(rng, 5)
    return {
        "key": jax.random.normal(keys[0], (steps, K)),
        "value": jax.random.normal(keys[1], (steps, V)),
        "noise": jax.random.uniform(keys[2], (steps,), minval=0.1),
        "decay": jax.random.uniform(keys[3], (steps,), minval=0.5),
        "drift": jax.random.uniform(keys[4], (steps,), minval=0.1),
    }


def last_memory(model: Callable, sites) -> jax.Array:
    """The memory after the last step of a whole model, as a function of its latent sites."""
    if model is memory_is_a_sum:
        memory = sites["start"]
        for t in range(STEPS):
            memory = memory * sites["decay"][t] + sites["write"][t]
        return memory.ravel()
    if model in (memory_never_moves, inputs_as_arrays):
        return sites["start"].ravel()
    last = sites["memory"][-1].ravel()
    return jnp.concatenate([last, sites["slow"].ravel()]) if "slow" in sites else last


def condition_densely(model: Callable, inputs) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior of the last memory and log evidence, by the original model's own log density."""
    arguments = tuple(inputs.values()) if model is inputs_by_name else (inputs,)
    shapes = {"start": (V, K)}
    if model is memory_is_a_sum:
        shapes["write"] = (STEPS, V, K)
    elif model not in (memory_never_moves, inputs_as_arrays):
        shapes["memory"] = (STEPS, V, K)
    if model is tuple_of_memories:
        shapes["slow"] = (V, K)
    flat, unravel = ravel_pytree({name: jnp.zeros(shape) for name, shape in shapes.items()})
    seeded = numpyro.handlers.seed(model, jax.random.key(0))

    @jax.jit
    def expand():
        def density(latents):
            return log_density(seeded, arguments, {}, unravel(latents))[0]

        def last(latents):
            return last_memory(model, {**unravel(latents), "decay": inputs["decay"]})

        return (
            density(flat),
            jax.grad(density)(flat),
            jax.hessian(density)(flat),
            last(flat),
            jax.jacobian(last)(flat),
        )

    height, slope, curvature, origin, matrix = (np.asarray(part) for part in expand())
    mode = np.linalg.solve(-curvature, slope)
    covariance = np.linalg.inv(-curvature)
    log_evidence = (
        height
        + 0.5 * slope @ mode
        + 0.5 * (len(mode) * np.log(2 * np.pi) - np.linalg.slogdet(-curvature)[1])
    )
    return origin + matrix @ mode, matrix @ covariance @ matrix.T, log_evidence


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_filter_is_that_of_the_original_log_density(model):
    inputs = draw(jax.random.key(1), STEPS)
    mean, covariance, log_evidence = condition_densely(model, inputs)
    design = from_scan(model, draw)
    if model is tuple_of_memories:
        design = replace(design, readout=lambda memory, u: memory[0] @ u["key"])
    exact = draft(design)
    drawn = exact.model.draw_inputs(jax.random.key(1), STEPS)
    beliefs = jax.jit(lambda inputs: exact.run(inputs))(drawn)
    last = jax.tree.map(lambda leaf: leaf[-1], beliefs.beliefs)
    np.testing.assert_allclose(exact.flat(last.mean), mean, atol=1e-10)
    np.testing.assert_allclose(exact.dense_covariance(last.covariance), covariance, atol=1e-10)
    np.testing.assert_allclose(jnp.sum(beliefs.log_evidence), log_evidence, rtol=1e-10)


def test_a_memory_that_is_a_site_is_split_into_transition_and_observation():
    exact = draft(from_scan(memory_is_a_site, draw))
    assert [site.name for site in exact.proof.transition.sites] == ["memory"]
    assert [site.name for site in exact.proof.observe.observed] == ["value"]
    assert exact.structure.kind == "shared rows"


def test_an_observation_of_the_past_stays_in_the_transition():
    exact = draft(from_scan(the_past_is_observed, draw))
    assert [site.name for site in exact.proof.transition.observed] == ["value"]
    assert exact.structure.evidence_sees_memory


def test_an_observation_that_turns_to_the_past_at_other_inputs_is_not_filtered():
    """At the examples it is of the new memory alone; where it is not, nothing is said."""

    def model(inputs):
        def step(memory, u):
            moved = drift_on(memory, u)
            read(jnp.where(u["noise"] > 9, memory, moved), u)
            return moved, None

        scan(step, start(), inputs)

    exact = draft(from_scan(model, draw))
    inputs = exact.model.draw_inputs(jax.random.key(1), STEPS)
    exact.run(inputs)
    with pytest.raises(ModelError, match="`observe`, site 'value', step 3: its loc is nan"):
        exact.run({**inputs, "noise": inputs["noise"].at[2].set(10.0)})


def test_default_inputs_are_drawn_by_name():
    design = from_scan(inputs_by_name)
    drawn = design.draw_inputs(jax.random.key(0), STEPS)
    assert {"key", "value", "noise", "decay", "drift", "query"} <= set(drawn)
    assert draft(design).structure.kind == "shared rows"


def refuse(model, match):
    with pytest.raises(ModelError, match=match):
        from_scan(model, draw)


def test_a_second_scan_is_refused():
    def model(inputs):
        def step(memory, u):
            read(memory, u)
            return memory, None

        memory = start()
        scan(step, memory, inputs)
        scan(step, memory, inputs)

    refuse(model, "holds another scan after its scan; a read-out belongs in DesignModel")


def test_a_sample_after_the_scan_is_refused():
    def model(inputs):
        memory_is_a_site(inputs)
        numpyro.sample("late", dist.Normal(0.0, 1.0))

    refuse(model, "holds site 'late' after its scan; a read-out belongs in DesignModel")


def test_a_python_loop_over_time_is_refused():
    def model(inputs):
        memory = start()
        for t in range(len(inputs["key"])):
            with numpyro.handlers.scope(prefix=f"step_{t}"):
                u = {name: array[t] for name, array in inputs.items()}
                memory = drift_on(memory, u)
                read(memory, u)

    refuse(model, r"calls no `numpyro.contrib.control_flow.scan`")


def test_a_scan_in_reverse_is_refused():
    def model(inputs):
        def step(memory, u):
            read(memory, u)
            return memory, None

        scan(step, start(), inputs, reverse=True)

    refuse(model, "runs in reverse or with history; write it forwards")


def test_a_scan_over_no_inputs_is_refused():
    def model(inputs):
        def step(memory, _):
            read(memory, {name: array[0] for name, array in inputs.items()})
            return memory, None

        scan(step, start(), None, length=STEPS)

    with pytest.raises(ModelError, match="must return a dict of arrays"):
        draft(from_scan(model, draw))


def test_inputs_without_a_default_are_named():
    def model(key, strength):
        memory_is_a_site({"key": key, "strength": strength})

    with pytest.raises(ModelError, match=r"takes \['strength'\], which have no default; pass"):
        from_scan(model)
