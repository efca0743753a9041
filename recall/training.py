"""Training: several runs of one plan side by side, resumable to the last bit."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from layers.sharded import DATA, split_axis
from layers.sources import PerHead

from .courses import Course, Questions
from .meshes import everywhere, in_use, kept_in_place, shown
from .models import MakeMixer, RecallModel, pair_model, token_model
from .plans import Plan
from .tasks.associative import AssociativeRecall

Report = Callable[[int, np.ndarray, np.ndarray, int], None]
"""(step, loss of every run, accuracy of every run, tokens that each run was shown)."""

_STRETCH = 50
"""Steps of one dispatch, where rows of one kind follow each other."""


class Runs(eqx.Module):
    """Models and optimiser states, with a leading axis over the plan's runs."""

    models: RecallModel
    optimiser: Any

    @property
    def first(self) -> RecallModel:
        """The model of the first run."""
        arrays, rest = eqx.partition(self.models, eqx.is_array)
        return eqx.combine(jax.tree.map(lambda leaf: leaf[0], arrays), rest)


def start(plan: Plan, make_mixer: MakeMixer) -> Runs:
    """Initial parameters of every run."""
    rows = plan.course.segments[0].rows

    def one(rng: PRNGKeyArray) -> RecallModel:
        if isinstance(rows, AssociativeRecall):
            return pair_model(rows.codes, plan.d_model, rows.overlap, 0, make_mixer, rng=rng)
        return token_model(rows.vocabulary, plan.d_model, make_mixer, dropout=plan.dropout, rng=rng)

    rngs = jnp.stack([jax.random.key(seed) for _, seed in plan.runs])
    models = eqx.filter_vmap(one)(rngs)
    optimiser = eqx.filter_vmap(lambda model: _adam(plan.weight_decay).init(_parameters(model)))(
        models
    )
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
    mesh: Mesh | None = None,
) -> Runs:
    """Train from step `first` to before step `last` of the plan's course.

    Args:
        plan: the course, rates and seeds.
        runs: as `start` or an earlier call returned them.
        first: step to begin with.
        last: step to end before.
        report: called for each step, while the device is at later ones.
        mesh: of the devices that runs are placed on (`recall.meshes`).
    """
    course, stretch = plan.course, _stretch_of(plan.weight_decay)
    rates = np.asarray([rate for rate, _ in plan.runs], np.float32)
    rng = np.asarray(jax.random.key_data(jax.random.key(course.seed)))
    room = _STRETCH if course.epochs else 1
    waiting: Callable[[], None] | None = None
    for steps in _stretches(course, first, last, room):
        batches = [course.questions(step) for step in steps]
        scales = np.zeros(room, np.float32)
        scales[: len(steps)] = [0.5 * (1 + np.cos(np.pi * course.progress(step))) for step in steps]
        shape = room, course.batch, course.most_asked(batches[0].inputs.shape[1])
        asked = shown(_stacked(batches, *shape), mesh)
        count, begin = np.int32(len(steps)), np.int32(steps[0])
        with in_use(mesh):
            runs, told = stretch((rates, asked, scales, begin, count, rng), runs)
        if waiting is not None:
            waiting()
        waiting = partial(_tell, report, steps, told, [batch.tokens for batch in batches])
    if waiting is not None:
        waiting()
    return runs


def _stretches(course: Course, first: int, last: int, room: int) -> Iterator[range]:
    """Steps that follow each other and show rows of one kind, at most `room` at a time."""
    while first < last:
        end = min(last, first + min(room, course.alike(first)))
        yield range(first, end)
        first = end


def _tell(report: Report, steps: range, told: Array, tokens: list[int]) -> None:
    losses, accuracies = np.asarray(told)
    for place, step in enumerate(steps):
        report(step, losses[place], accuracies[place], tokens[place])


def loss_and_accuracy(
    model: RecallModel, asked: "Asked", rng: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy of all questions, and accuracy averaged over the rows that have some."""
    rngs = None if rng is None else jax.random.split(rng, len(asked.inputs))

    def row(inputs, places, rng):
        return model(inputs, places, rng=rng)

    rows = jax.vmap(row, spmd_axis_name=split_axis(DATA, len(asked.inputs)))
    answer = rows(asked.inputs, asked.places, rngs)
    losses = optax.softmax_cross_entropy_with_integer_labels(answer.logits, asked.answers)
    right = jnp.argmax(answer.logits, axis=-1) == asked.answers
    counts = jnp.sum(asked.weights, axis=1)
    shares = jnp.sum(right * asked.weights, axis=1) / jnp.maximum(counts, 1)
    accuracy = jnp.sum(shares) / jnp.sum(counts > 0)
    return jnp.sum(losses * asked.weights) / jnp.sum(asked.weights), accuracy


class Asked(eqx.Module):
    """`Questions` as a model takes them, of one step or with a leading axis over several."""

    inputs: Array | np.ndarray
    places: Array | np.ndarray
    answers: Array | np.ndarray
    weights: Array | np.ndarray


@cache
def _stretch_of(weight_decay: float) -> Callable[..., tuple[Runs, Array]]:
    """One program for any number of steps, so that it does not matter where a run is resumed.

    Returns:
        Maps ((rates, batches, scales of the rates, first step, count of steps, key), runs) to the
        runs after them and (loss or accuracy, step, run).
    """
    transform = _adam(weight_decay)

    def step(runs, rates, asked, scale, rng):
        def one(model, state, rate):
            value = eqx.filter_value_and_grad(loss_and_accuracy, has_aux=True)
            (loss, accuracy), slopes = value(model, asked, rng)
            updates, state = transform.update(_parameters(slopes), state, _parameters(model))
            updates = jax.tree.map(lambda update: -rate * scale * update, updates)
            return Runs(eqx.apply_updates(model, updates), state), jnp.stack([loss, accuracy])

        return eqx.filter_vmap(one, out_axes=(eqx.if_array(0), 1))(
            runs.models, runs.optimiser, rates
        )

    @eqx.filter_jit(donate="all-except-first")
    def stretch(given, runs):
        rates, asked, scales, first, count, words = given
        rng = jax.random.wrap_key_data(words)
        arrays, rest = eqx.partition(runs, eqx.is_array)

        def body(place, carry):
            arrays, told = carry
            now = jax.tree.map(lambda part: part[place], asked)
            rng_now = jax.random.fold_in(rng, first + place)
            after, found = step(eqx.combine(arrays, rest), rates, now, scales[place], rng_now)
            after = kept_in_place(eqx.filter(after, eqx.is_array))
            return after, told.at[:, place].set(found)

        told = jnp.zeros((2, len(scales), len(rates)))
        arrays, told = jax.lax.fori_loop(0, count, body, (arrays, told))
        return eqx.combine(arrays, rest), everywhere(told)

    return stretch


def _adam(weight_decay: float) -> optax.GradientTransformation:
    """AdamW at rate 1; the decay is on all parameters, as upstream's."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay))


def _parameters(model: RecallModel) -> Any:
    """What training changes: numbers that a head is given for good are not among them."""

    def fixed(node: Any) -> bool:
        return isinstance(node, PerHead) and not node.learned

    def learned(node: Any) -> Any:
        return eqx.tree_at(lambda one: one.parameter, node, None) if fixed(node) else node

    return eqx.filter(jax.tree.map(learned, model, is_leaf=fixed), eqx.is_inexact_array)


def _stacked(batches: list[Questions], steps: int, rows: int, queries: int) -> Asked:
    """Batches as one array each, filled up with weight 0: rows of one length, one program."""

    def stack(parts: list[np.ndarray], width: int) -> np.ndarray:
        stacked = np.zeros((steps, rows, width, *parts[0].shape[2:]), parts[0].dtype)
        for place, part in enumerate(parts):
            stacked[place, : len(part), : part.shape[1]] = part
        return stacked

    length = batches[0].inputs.shape[1]
    queries = max(queries, *(batch.places.shape[1] for batch in batches))
    return Asked(
        stack([batch.inputs for batch in batches], length),
        stack([batch.places for batch in batches], queries),
        stack([batch.answers for batch in batches], queries),
        stack([batch.weights for batch in batches], queries),
    )
