"""Recall without training: tokens as fixed random directions, filters as the memory.

Every token is a random unit vector. Each (key, value) pair of the context is written, each query
read, and the answer decoded to the nearest value. What limits recall is then the filter alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from design_models import DesignModel, associative_regression, increment_evidence
from design_models.policy import Exact, Policy, Reset
from inference.derivation import derive, widen
from inference.exact_filter import ExactFilter

from .mqar import RecallBatch

NOISE_RATIO = 0.01
"""Observation noise variance over prior variance: values are written almost without noise."""


@dataclass(frozen=True)
class Contender:
    """A filter in the comparison: a design model, and a policy given its prior variance."""

    name: str
    design: Callable[..., DesignModel]
    policy: Callable[[float], Policy]


CONTENDERS = (
    Contender("exact", associative_regression, lambda variance: Exact()),
    Contender("reset", associative_regression, Reset),
    Contender("additive", increment_evidence, lambda variance: Exact()),
)
"""Bayesian regression, its reset (the delta rule), and linear attention."""


@dataclass(frozen=True)
class RecallScore:
    """How well one filter recalled.

    Args:
        filter: its name.
        width: keys and values have this many entries.
        accuracy: part of the queries answered right.
        squared_error: mean squared distance of read-out and value, which has length 1.
        predicted: the squared error that the filter predicted, from its own variance.
    """

    filter: str
    width: int
    accuracy: float
    squared_error: float
    predicted: float


def run(
    batch: RecallBatch,
    widths: Sequence[int],
    *,
    seed: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[RecallScore]:
    """Score every contender at every width on a batch.

    The filters are derived from their design models at a small width, and widened.
    """
    scores = []
    with jax.enable_x64(True):
        for contender in CONTENDERS:
            narrow = derive(contender.design(3, 2))
            for width in widths:
                progress(f"{contender.name}, width {width}")
                scores.append(_score(contender, narrow, batch, width, seed))
    return scores


def _score(
    contender: Contender, narrow: ExactFilter, batch: RecallBatch, width: int, seed: int
) -> RecallScore:
    variance = 1 / width  # so that the prior predicts values of length 1
    model = contender.design(width, width, prior_variance=variance)
    exact = widen(narrow, model)
    rng = np.random.default_rng(seed)
    tokens = int(max(part.max() for part in (batch.keys, batch.queries, batch.candidates))) + 1
    directions = rng.normal(size=(2, tokens, width))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    key_vectors, value_vectors = jnp.asarray(directions[0]), jnp.asarray(directions[1])
    candidates = jnp.asarray(batch.candidates)

    @jax.jit
    def recall(row):
        keys, values, queries, answers = row
        count = len(keys)
        inputs = {
            "key": key_vectors[keys],
            "value": value_vectors[values],
            "drift": jnp.full(count, variance),
            "noise": jnp.full(count, NOISE_RATIO * variance),
        }
        belief = exact.absorb(inputs, contender.policy(variance))
        read = partial(exact.read, belief)
        found = jax.lax.map(lambda query: read({"query": query}), key_vectors[queries])
        # Values have length 1, so the nearest has the largest inner product.
        nearest = candidates[jnp.argmax(found.mean @ value_vectors[candidates].T, axis=-1)]
        error = jnp.sum((found.mean - value_vectors[answers]) ** 2, axis=-1)
        predicted = jnp.sum(found.variance, axis=-1)
        return jnp.mean(nearest == answers), jnp.mean(error), jnp.mean(predicted)

    parts = (batch.keys, batch.values, batch.queries, batch.answers)
    scores = jax.lax.map(recall, tuple(jnp.asarray(part) for part in parts))
    return RecallScore(contender.name, width, *(float(jnp.mean(score)) for score in scores))
