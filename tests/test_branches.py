"""Structure where the inputs choose: it must hold for every choice, also those no example makes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from dense_conditioning import assert_filter_conditions_densely, condition_densely
from jax import lax

from design_models import DesignModel
from inference.branches import DRAW, with_open_choices
from inference.derivation import draft

STEPS, V, K = 2, 2, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def prior():
    return numpyro.sample("S", dist.Normal(jnp.zeros((V, K)), 1.0).to_event(2))


def drifting(mean):
    return numpyro.sample("moved", dist.Normal(mean, 0.5).to_event(2))


def read(S, u):
    law = dist.Normal(S @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
    numpyro.sample("value", law, obs=u["value"])


def common(steps):
    rng = np.random.default_rng(steps)
    return {
        "key": jnp.asarray(rng.normal(size=(steps, K))),
        "value": jnp.asarray(rng.normal(size=(steps, V))),
        "query": jnp.asarray(rng.normal(size=(steps, K))),
        "noise": jnp.asarray(rng.uniform(0.2, 0.8, steps)),
        "decay": jnp.asarray(rng.uniform(0.5, 0.9, steps)),
        "slot": jnp.zeros(steps, int),
        "reset": jnp.zeros(steps, bool),
        "gates": jnp.asarray(rng.uniform(0.5, 0.9, (steps, V))),
    }


def moving(move):
    """A model whose memory moves by `move(S, u)`."""
    return DesignModel(
        prior, lambda S, u: drifting(move(S, u)), read, inputs=lambda rng, steps: common(steps)
    )


def transposed_when_noisy(S, u):
    return jnp.where(u["noise"] > 9, S.T, S)


def transposed_in_a_branch(S, u):
    return lax.cond(u["noise"] > 9, lambda S: S.T, lambda S: S, S)


def transposed_by_a_flag(S, u):
    return S + u["slot"] * S.T


def transposed_by_a_boolean(S, u):
    return S + u["reset"] * S.T


def transposed_above_a_threshold(S, u):
    return S + jnp.maximum(u["noise"] - 9, 0) * S.T


def transposed_by_rounding(S, u):
    return S + jnp.floor(u["noise"] / 9) * S.T


def transposed_by_sign(S, u):
    return S + (jnp.sign(u["noise"] - 9) + 1) * S.T


def transposed_by_a_root(S, u):
    return S + (jnp.sqrt((9 - u["noise"]) ** 2) - (9 - u["noise"])) * S.T


def transposed_many_times(S, u):
    turns = jnp.where(u["noise"] > 9, 1, 2)
    return lax.fori_loop(0, turns, lambda _, memory: memory.T, S)


def transposed_by_the_largest(S, u):
    return jnp.stack([S, S.T])[jnp.argmax(jnp.stack([jnp.asarray(9.0), u["noise"]]))]


def transposed_within_a_loop(S, u):
    def step(memory, threshold):
        return jnp.where(u["noise"] > threshold, memory.T, memory), None

    return lax.scan(step, S, jnp.array([9.0, 99.0, 999.0]))[0]


def row_cleared(S, u):
    return S.at[u["slot"]].add(-0.5 * S[0])


def rows_alike_below_a_threshold(S, u):
    return S * jnp.stack([u["noise"], jnp.minimum(u["noise"], 9.0)])[:, None]


def rows_alike_in_one_branch(S, u):
    return jnp.where(u["noise"] > 9, S * jnp.array([[1.0], [0.5]]), S)


MIXING = [
    transposed_when_noisy, transposed_in_a_branch, transposed_by_a_flag, transposed_by_a_boolean,
    transposed_above_a_threshold, transposed_by_rounding, transposed_by_sign,
    transposed_by_a_root, transposed_many_times, transposed_by_the_largest,
    transposed_within_a_loop, row_cleared, rows_alike_below_a_threshold,
    rows_alike_in_one_branch,
]  # fmt: skip


@pytest.mark.parametrize("move", MIXING, ids=lambda move: move.__name__)
def test_rows_that_some_choice_treats_unlike_do_not_share_a_covariance(move):
    assert draft(moving(move)).structure.kind != "shared rows"


@pytest.mark.parametrize("move", [transposed_when_noisy, transposed_by_a_flag, row_cleared])
def test_a_choice_that_no_example_makes_is_filtered_exactly(move):
    model, inputs = moving(move), common(STEPS)
    far = {
        **inputs,
        "noise": inputs["noise"].at[0].set(10.0),
        "slot": jnp.array([1, 0]),
        "reset": jnp.array([True, False]),
    }
    assert_filter_conditions_densely(draft(model), far, condition_densely(model, far))


def reset_at_a_boundary(S, u):
    return jnp.where(u["reset"], jnp.zeros_like(S), u["decay"] * S)


def reset_by_its_decay(S, u):
    return jnp.where(u["reset"], 0.0, u["decay"]) * S


def clipped_decay(S, u):
    return jnp.clip(u["decay"], 0.0, 1.0) * S


def gated_by_softplus(S, u):
    return jnp.exp(-jax.nn.softplus(u["noise"])) * S


def one_of_two_decays(S, u):
    return lax.cond(u["noise"] > 9, lambda S: 0.5 * S, lambda S: S * u["decay"], S)


def decay_from_a_table(S, u):
    return jnp.array([0.5, 0.7, 0.9])[u["slot"]] * S


def decay_to_the_power_of_a_count(S, u):
    return u["decay"] ** u["slot"] * S


SHARED = [
    reset_at_a_boundary, reset_by_its_decay, clipped_decay, gated_by_softplus, one_of_two_decays,
    decay_from_a_table, decay_to_the_power_of_a_count,
]  # fmt: skip


@pytest.mark.parametrize("move", SHARED, ids=lambda move: move.__name__)
def test_a_choice_that_treats_rows_alike_keeps_one_covariance_for_all(move):
    structure = draft(moving(move)).structure
    assert (structure.kind, structure.transition) == ("shared rows", "scalar")
    assert not structure.shifted


def reading(observe):
    def observed(S, u):
        law = dist.Normal(observe(S, u), jnp.sqrt(u["noise"])).to_event(1)
        numpyro.sample("value", law, obs=u["value"])

    return DesignModel(
        prior, lambda S, u: drifting(S), observed, inputs=lambda rng, steps: common(steps)
    )


def unit_key(S, u):
    return S @ (u["key"] / jnp.maximum(jnp.linalg.norm(u["key"]), 1e-6))


def key_of_each_row(S, u):
    keys = [u["key"] / jnp.maximum(jnp.linalg.norm(u["key"]), 1e-6) for _ in range(V)]
    return jnp.stack([row @ key for row, key in zip(S, keys, strict=True)])


def softmax_key(S, u):
    return S @ jax.nn.softmax(u["key"])


def positive_key(S, u):
    return S @ jax.nn.relu(u["key"])


def key_from_a_table(S, u):
    return S @ jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])[u["slot"]]


def key_solved_for(S, u):
    return S @ jnp.linalg.solve(jnp.eye(K) + jnp.outer(u["key"], u["key"]), u["key"])


@pytest.mark.parametrize(
    "observe",
    [unit_key, key_of_each_row, softmax_key, positive_key, key_from_a_table, key_solved_for],
    ids=lambda observe: observe.__name__,
)
def test_a_key_that_is_chosen_keeps_one_covariance_for_all_rows(observe):
    assert draft(reading(observe)).structure.kind == "shared rows"


def test_rows_with_a_choice_each_have_a_covariance_each():
    move = lambda S, u: jnp.where(u["gates"] > 9, 0.0, 1.0)[:, None] * S  # noqa: E731
    assert draft(moving(move)).structure.kind == "separate rows"


def test_the_words_name_the_line_that_chooses():
    words = draft(moving(transposed_when_noisy)).structure.words
    line = transposed_when_noisy.__code__.co_firstlineno + 1
    assert f"whatever the inputs choose (at {__file__}:{line} (transposed_when_noisy))" in words
    assert "choose" not in draft(moving(clipped_decay)).structure.words


def test_a_choice_that_cannot_be_followed_leaves_the_memory_undivided():
    def randomly(S, u):
        key = jax.random.wrap_key_data(jnp.stack([u["slot"], u["slot"]]).astype(jnp.uint32))
        return S + 0.1 * jax.random.normal(key, S.shape)

    exact = draft(moving(randomly))
    assert exact.partition.states.shape == (1, 1, V * K)
    assert exact.structure.words.endswith("so no structure is claimed.")


def test_a_function_without_choices_is_evaluated_as_it_is():
    def smooth(u):
        return jnp.exp(-u["a"]) @ jnp.linalg.inv(u["b"]) / (1 + jnp.sum(u["a"] ** 2))

    u = {"a": jnp.array([0.3, -2.0]), "b": jnp.array([[2.0, 0.3], [-0.4, 1.0]])}
    evaluate, places = with_open_choices(smooth, u)
    np.testing.assert_allclose(evaluate(u, jnp.zeros(DRAW)), smooth(u), rtol=1e-15)
    assert places == ()


def test_what_is_left_open_differs_from_draw_to_draw_and_is_one_function_of_entries():
    evaluate, _ = with_open_choices(lambda u: jnp.abs(u["a"]), {"a": jnp.zeros(3)})
    u = {"a": jnp.array([0.3, 0.3, 0.4])}
    draws = np.array(
        [evaluate(u, draw) for draw in jax.random.normal(jax.random.key(0), (4, DRAW))]
    )
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])
    assert np.all(np.abs(draws[:, 0] - draws[:, 2]) > 1e-3)
    assert len(np.unique(draws[:, 0])) == 4


def test_a_mixture_is_each_case_at_zero_and_at_one():
    evaluate = partial(
        with_open_choices(
            lambda u: jnp.where(u["flag"], jnp.array([1.0, 2.0]), jnp.array([5.0, 7.0])),
            {"flag": jnp.array(True)},
        )[0],
        draw=jnp.zeros(DRAW),
    )
    np.testing.assert_allclose(evaluate({"flag": jnp.array(0.0)}), [5.0, 7.0])
    np.testing.assert_allclose(evaluate({"flag": jnp.array(1.0)}), [1.0, 2.0])
    np.testing.assert_allclose(evaluate({"flag": jnp.array(0.5)}), [3.0, 4.5])
