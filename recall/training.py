"""Training: several runs of one plan side by side, resumable to the last bit."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from .courses import Questions
from .models import MakeMixer, RecallModel, pair_model, token_model
from .plans import Plan
from .tasks.associative import AssociativeRecall

Report = Callable[[int, np.ndarray, np.ndarray, int], None]
"""(step, loss of every run, accuracy of every run, tokens that each run was shown)."""


class Runs(eqx.Module):
    """Models and optimiser states, with a leading axis over the plan's runs."""

    models: RecallModel
    optimiser: Any


def start(plan: Plan, make_mixer: MakeMixer) -> Runs:
    """Initial parameters of every run."""
    rows = plan.course.segments[0].rows

    def one(rng: PRNGKeyArray) -> RecallModel:
        if isinstance(rows, AssociativeRecall):
            return pair_model(rows.codes, plan.d_model, rows.overlap, 0, make_mixer, rng=rng)
        return token_model(rows.vocabulary, plan.d_model, make_mixer, dropout=plan.dropout, rng=rng)

    rngs = jnp.stack([jax.random.key(seed) for _, seed in plan.runs])
    models = eqx.filter_vmap(one)(rngs)
    optimiser = eqx.filter_vmap(lambda model: _adam(plan).init(_parameters(model)))(models)
    # Without weak types, so that the second step is the compiled first one.
    arrays, rest = eqx.partition(Runs(models, optimiser), eqx.is_array)
    strong = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), arrays)
    return eqx.combine(strong, rest)


def train(
    plan: Plan,
    runs: Runs,
    first: int,
    last: int,
    report: Report = lambda *told: None,
    devices: int = 1,
) -> Runs:
    """Train from step `first` to before step `last` of the plan's course.

    Args:
        plan: the course, rates and seeds.
        runs: as `start` or an earlier call returned them.
        first: step to begin with.
        last: step to end before.
        report: called after each step.
        devices: how many devices share the rows of a batch.
    """
    rates = jnp.asarray([rate for rate, _ in plan.runs], jnp.float32)
    place = _sharing(devices)
    step = _step_of(plan)
    for index in range(first, last):
        asked = place(plan.course.questions(index))
        scale = 0.5 * (1 + np.cos(np.pi * plan.course.progress(index)))
        rng = jax.random.fold_in(jax.random.key(plan.course.seed), index)
        runs, loss, accuracy = step(runs, rates, jnp.float32(scale), asked, rng)
        tokens = asked.inputs.shape[0] * asked.inputs.shape[1]
        report(index, np.asarray(loss), np.asarray(accuracy), tokens)
    return runs


def loss_and_accuracy(
    model: RecallModel, asked: "Asked", rng: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy of all questions, and accuracy averaged row by row."""
    rngs = None if rng is None else jax.random.split(rng, len(asked.inputs))
    answer = jax.vmap(lambda inputs, places, rng: model(inputs, places, rng=rng))(
        asked.inputs, asked.places, rngs
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(answer.logits, asked.answers)
    right = jnp.argmax(answer.logits, axis=-1) == asked.answers
    counts = jnp.maximum(jnp.sum(asked.weights, axis=1), 1)
    accuracy = jnp.mean(jnp.sum(right * asked.weights, axis=1) / counts)
    return jnp.sum(losses * asked.weights) / jnp.sum(asked.weights), accuracy


class Asked(eqx.Module):
    """`Questions` on a device."""

    inputs: Array
    places: Array
    answers: Array
    weights: Array


def _step_of(plan: Plan) -> Callable[..., tuple[Runs, Array, Array]]:
    transform = _adam(plan)

    @eqx.filter_jit(donate="all-except-first")
    def step(rates, runs, scale, asked, rng):
        def one(model, state, rate):
            value = eqx.filter_value_and_grad(loss_and_accuracy, has_aux=True)
            (loss, accuracy), slopes = value(model, asked, rng)
            updates, state = transform.update(slopes, state, _parameters(model))
            updates = jax.tree.map(lambda update: -rate * scale * update, updates)
            return Runs(eqx.apply_updates(model, updates), state), loss, accuracy

        return eqx.filter_vmap(one)(runs.models, runs.optimiser, rates)

    return lambda runs, rates, scale, asked, rng: step(rates, runs, scale, asked, rng)


def _adam(plan: Plan) -> optax.GradientTransformation:
    """AdamW at rate 1; the decay is on all parameters, as upstream's."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(plan.weight_decay))


def _parameters(model: RecallModel) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def _sharing(devices: int) -> Callable[[Questions], Asked]:
    """Put a batch on the devices, rows shared among them."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def place(questions: Questions) -> Asked:
        parts = questions.inputs, questions.places, questions.answers, questions.weights
        if devices == 1:
            return Asked(*map(jnp.asarray, parts))
        return Asked(*(jax.device_put(part, rows) for part in parts))

    return place
