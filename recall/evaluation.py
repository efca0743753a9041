r"""Accuracy, calibration and abstention of trained models, where something is asked.

A model's confidence is its largest probability. Calibration error is the mean gap between
confidence and accuracy over 15 bins of equal width; coverage is how often the smallest set of
answers with probability 0.9 holds the right one. Abstention is judged by the area under the ROC
curve of a signal for wrong answers: of the memory's variance, and of the softmax's entropy.

Where values are continuous, the memory's own predictive distribution is judged too. A head says
that a value seen along its query is N(mean, value variance), number by number; the truth is the
value that it would be shown, were the answer given where the question stands.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from inference.calibration import Calibration, calibration
from layers.compiled import KeyedMemory
from layers.entries import EntryMemory
from layers.memory import Prediction, StreamMemory
from layers.mixer import SequenceMixer
from layers.rules import Additive

from .abstention import auroc
from .courses import Questions
from .models import RecallModel

SET_LEVEL = 0.9
_BINS = 15
_NUMBERS_AT_ONCE = 2**27
"""Bounds the logits that are held at once."""
_STATES_AT_ONCE = 2**30
"""Bounds what is held at once by memories that form a matrix a token, d_model² numbers at most."""


@dataclass(frozen=True)
class Scores:
    """How a model did on one kind of rows.

    Args:
        accuracy: averaged row by row.
        macro_accuracy: averaged over the right answers' classes, as MAD's metric.
        calibration_error: expected, of the confidence.
        coverage: of sets of probability 0.9.
        entropy_auroc: of the softmax's entropy as a sign of a wrong answer; NaN where all answers
            are right, or all wrong.
        variance_auroc: of the memory's variance likewise; NaN where it has none.
        memory: how honest it is about the values asked for; None where these are tokens, or where
            it predicts no values.
    """

    accuracy: float
    macro_accuracy: float
    calibration_error: float
    coverage: float
    entropy_auroc: float
    variance_auroc: float
    memory: Calibration | None = None


def evaluate(models: RecallModel, asked: Questions) -> list[Scores]:
    """Score every model of a leading axis on the same questions."""
    parts = asked.inputs, asked.places, asked.answers
    told = {
        name: np.asarray(array)
        for name, array in _answers(models, *parts, _rows_at_once(models, asked)).items()
    }
    runs = [{name: array[i] for name, array in told.items()} for i in range(len(told["guess"]))]
    return [_score(run, asked) for run in runs]


@eqx.filter_jit
def _answers(models: RecallModel, inputs, places, answers, rows: int) -> dict[str, Array]:
    """What every model says to every question, (model, row, query), so many rows at a time."""

    def one(model, inputs, places, right):
        answer = model(inputs, places)
        logs = jax.nn.log_softmax(answer.logits)
        chances = jnp.exp(logs)
        own = jnp.take_along_axis(chances, right[..., None], axis=-1)
        above = jnp.sum(jnp.where(chances > own, chances, 0), axis=-1)
        told = {
            "guess": jnp.argmax(logs, axis=-1),
            "confidence": jnp.max(chances, axis=-1),
            "covered": above < SET_LEVEL,
            "entropy": -jnp.sum(chances * logs, axis=-1),
        }
        if answer.variance is not None:
            told["variance"] = answer.variance
        if answer.prediction is not None and _predicts_values(model, inputs):
            told |= _values(model, inputs, places, right, answer.prediction)
        return told

    def row(shown):
        return eqx.filter_vmap(one, in_axes=(eqx.if_array(0), None, None, None))(models, *shown)

    told = jax.lax.map(row, (inputs, places, answers), batch_size=rows)
    return {name: jnp.moveaxis(array, 0, 1) for name, array in told.items()}


def _predicts_values(model: RecallModel, inputs: Array | np.ndarray) -> bool:
    """Whether values are continuous, and heads say how one that they have not seen is distributed.

    Inputs are those of any number of rows.
    """
    mixer = model.blocks[-1].mixer
    if inputs.shape[-1:] != (2,) or not isinstance(mixer, SequenceMixer):
        return False
    memory = mixer.memory
    knows_noise = isinstance(memory, StreamMemory | KeyedMemory | EntryMemory)
    return knows_noise and "value" in mixer.sources and not isinstance(memory.rule, Additive)


def _values(model: RecallModel, inputs, places, right, said: Prediction) -> dict[str, Array]:
    """Mean, variance and truth of every number that is asked for: (query, head, value)."""
    block = model.blocks[0]  # of pairs of vectors it is the only one
    source, answered = block.mixer.sources["value"], inputs.at[places, 1].set(right)
    asked, told = (jax.vmap(block.norm)(model.embedding(part)) for part in (inputs, answered))

    def shown(place):
        value, _ = source(asked.at[place].set(told[place]), source.init_state(), None, None)
        return value[place]

    truth = jax.lax.map(shown, places)
    if truth.ndim == 4:  # the last of several that a token writes
        truth = truth[:, :, -1]
    variance = said.value_variance.reshape(*truth.shape[:2], -1)
    return {"mean": said.mean, "spread": jnp.broadcast_to(variance, truth.shape), "truth": truth}


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean gap between confidence and accuracy, over bins of equal width."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(np.mean(right[bins == place]) - np.mean(confidence[bins == place]))
        * np.mean(bins == place)
        for place in np.unique(bins)
    ]
    return float(np.sum(gaps))


def _score(told: dict[str, np.ndarray], asked: Questions) -> Scores:
    said = [told.pop(name) for name in ("mean", "spread", "truth") if name in told]
    counts = asked.weights > 0
    right = told["guess"] == asked.answers
    by_row = np.sum(right & counts, axis=1) / np.maximum(np.sum(counts, axis=1), 1)
    flat = {name: array[counts] for name, array in told.items()}
    hit, answers = right[counts], asked.answers[counts]
    classes = [np.mean(hit[answers == answer]) for answer in np.unique(answers)]
    return Scores(
        float(np.mean(by_row)),
        float(np.mean(classes)),
        calibration_error(flat["confidence"], hit),
        float(np.mean(flat["covered"])),
        auroc(flat["entropy"], ~hit),
        auroc(flat["variance"], ~hit) if "variance" in flat else float("nan"),
        calibration(*said) if said else None,
    )


def _rows_at_once(models: RecallModel, asked: Questions) -> int:
    runs = len(jax.tree.leaves(eqx.filter(models, eqx.is_inexact_array))[0])
    (d_model,) = models.norm.shape
    logits = _NUMBERS_AT_ONCE // (models.embedding.codes * asked.places.shape[1])
    states = _STATES_AT_ONCE // (asked.inputs.shape[1] * d_model**2)
    return min(len(asked.inputs), max(1, min(logits, states) // runs))
