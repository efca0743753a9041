"""Recall without training: tokens as fixed random directions, filters as the memory.

Every token is a random unit vector. Each (key, value) pair of the context is written, each query
read, and the answer decoded to the nearest value. What limits recall is then the filter alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from design_models import DesignModel, associative_regression, increment_evidence
from design_models.policy import Exact, Policy, Reset
from inference.derivation import derive, widen
from inference.exact_filter import ExactFilter

from .mqar import RecallBatch

NOISE_RATIO = 0.01
"""Observation noise variance over prior variance, as the filters assume it."""

_ROWS_AT_ONCE = 64
_PRODUCTS_AT_ONCE = 2**24
"""Bound the memory that a large batch takes: read-outs kept, and their products with candidates."""


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
        squared_error: mean squared distance of the read-out from the value that was last written
            with the key, which has length 1.
        predicted_variance: mean variance of the read-out by the filter's own belief, without
            observation noise, summed over entries.
    """

    filter: str
    width: int
    accuracy: float
    squared_error: float
    predicted_variance: float


def run(
    batch: RecallBatch,
    widths: Sequence[int],
    *,
    seed: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[RecallScore]:
    """Score every contender at every width on a batch; contender by contender.

    The filters are derived from their design models at a small width, and widened. Contenders of
    one design model share that work.
    """
    scores: dict[tuple[str, int], RecallScore] = {}
    with jax.enable_x64(True):
        for design in dict.fromkeys(contender.design for contender in CONTENDERS):
            contenders = [own for own in CONTENDERS if own.design is design]
            progress(f"deriving {', '.join(own.name for own in contenders)}")
            narrow = derive(design(3, 2))
            for width in dict.fromkeys(widths):
                progress(f"width {width} of {', '.join(own.name for own in contenders)}")
                # With this variance the prior predicts values of length 1.
                exact = widen(narrow, design(width, width, prior_variance=1 / width))
                for own in contenders:
                    scores[own.name, width] = _score(own, exact, batch, width, seed)
    return [scores[own.name, width] for own in CONTENDERS for width in dict.fromkeys(widths)]


def _score(
    contender: Contender, exact: ExactFilter, batch: RecallBatch, width: int, seed: int
) -> RecallScore:
    key_vectors, value_vectors = directions(batch, width, seed)
    read_rows = _reader(exact, contender.policy(1 / width), 1 / width)
    right, error, variance = [], [], []
    for start in range(0, len(batch.keys), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        means, variances = read_rows(
            jnp.asarray(key_vectors[batch.keys[rows]]),
            jnp.asarray(value_vectors[batch.values[rows]]),
            jnp.asarray(key_vectors[batch.queries[rows]]),
        )
        means, answers = np.asarray(means), batch.answers[rows]
        right.append(_nearest(means, value_vectors, batch.candidates) == answers)
        error.append(np.sum((means - value_vectors[answers]) ** 2, axis=-1))
        variance.append(np.asarray(variances))
    metrics = (float(np.mean(np.concatenate(part))) for part in (right, error, variance))
    return RecallScore(contender.name, width, *metrics)


def directions(
    batch: RecallBatch, width: int, seed: int
) -> tuple[Float[np.ndarray, "token width"], Float[np.ndarray, "token width"]]:
    """Random unit vectors: what every token is as a key, and as a value."""
    parts = (batch.keys, batch.values, batch.queries, batch.candidates)
    tokens = int(max(part.max() for part in parts)) + 1
    drawn = np.random.default_rng(seed).normal(size=(2, tokens, width))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    return drawn[0], drawn[1]


def _reader(exact: ExactFilter, policy: Policy, variance: float) -> Callable[..., Any]:
    """Return (keys, values, queries) of some rows -> means and total variances of the read-outs."""

    def recall(row):
        keys, values, queries = row
        inputs = {
            "key": keys,
            "value": values,
            "drift": jnp.full(len(keys), variance),
            "noise": jnp.full(len(keys), NOISE_RATIO * variance),
        }
        belief = exact.absorb(inputs, policy)
        # One query after another: read-outs in parallel would multiply the memory.
        found = jax.lax.map(lambda query: exact.read(belief, {"query": query}), queries)
        return found.mean, jnp.sum(found.variance, axis=-1)

    return jax.jit(lambda *rows: jax.lax.map(recall, rows))


def _nearest(
    means: Float[np.ndarray, "row query width"],
    value_vectors: Float[np.ndarray, "token width"],
    candidates: Int[np.ndarray, " candidate"],
) -> Int[np.ndarray, "row query"]:
    """Decode to the nearest candidate: values have length 1, so to the largest inner product."""
    among = value_vectors[candidates].T
    flat = means.reshape(-1, means.shape[-1])
    size = max(1, _PRODUCTS_AT_ONCE // len(candidates))
    best = [np.argmax(flat[i : i + size] @ among, axis=-1) for i in range(0, len(flat), size)]
    return candidates[np.concatenate(best)].reshape(means.shape[:2])
