"""What a language model is worth on rows that training never showed."""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from layers import LanguageModel
from recall.text.corpus import Rows

from .forward import Compute, Packed, by_token, head_of, losses, packed, run_rows

_MOST_TOKENS = 65_536
"""Of a device's rows at one time."""


class Loss(NamedTuple):
    """Mean −log probability of a token, over rows, and its standard error over them."""

    mean: float
    error: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 50.0))


Scorer = Callable[[LanguageModel, Rows], np.ndarray]


@cache
def prose_scorer(end: int, mesh: Mesh, compute: Compute) -> Scorer:
    """Mean loss of each row's tokens."""

    def of_rows(model: LanguageModel, rows: Array) -> Float[Array, " row"]:
        batch = packed(rows, end)
        found = losses(model, run_rows(model, batch, compute).hidden, batch)
        return jnp.sum(found * batch.weights, axis=1) / jnp.sum(batch.weights, axis=1)

    return _by_row(of_rows, mesh)


@cache
def retrieval_scorer(end: int, mesh: Mesh, compute: Compute) -> Scorer:
    """Share of each row's answers whose every token is the likeliest after what comes before it.

    That is what greedy generation would say.
    """

    def of_rows(model: LanguageModel, rows: Array) -> Float[Array, " row"]:
        batch = packed(rows, end)
        right = rightly(model, run_rows(model, batch, compute).hidden, batch)
        before = jnp.pad(batch.asked, ((0, 0), (1, 0)))[:, :-1]
        answer = jnp.cumsum(batch.asked & ~before, axis=1)
        most = rows.shape[1] // 4  # an answer, and the question before it, take tokens

        def of_row(right, asked, answer):
            place = jnp.where(asked, answer, 0)
            wrong = jnp.zeros(most).at[place].max(jnp.where(asked, ~right, False) * 1.0)
            there = jnp.zeros(most).at[place].max(asked * 1.0)
            found, count = jnp.sum((there - wrong)[1:]), jnp.sum(there[1:])
            return found / jnp.maximum(count, 1)

        return jax.vmap(of_row)(right, batch.asked, answer)

    return _by_row(of_rows, mesh)


def rightly(model: LanguageModel, hidden: Float[Array, "row time d_model"], batch: Packed) -> Array:
    """Whether each target is the likeliest token."""
    head = head_of(model)

    def some(hidden, targets):
        scores = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return (jnp.argmax(scores, axis=-1) == targets).astype(jnp.float32)

    return by_token(some, hidden, batch.targets) > 0


def _by_row(of_rows: Callable[[LanguageModel, Array], Array], mesh: Mesh) -> Scorer:
    all_rows, everywhere = PartitionSpec("data"), PartitionSpec()
    devices = mesh.devices.size

    @eqx.filter_jit
    def shared(model, rows):
        arrays, static = eqx.partition(model, eqx.is_array)

        def own(arrays, rows):
            return of_rows(eqx.combine(arrays, static), rows)

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(everywhere, all_rows),
            out_specs=all_rows,
            check_vma=False,
        )(arrays, rows)

    def score(model: LanguageModel, rows: Rows) -> np.ndarray:
        count = max(1, min(_MOST_TOKENS // rows.shape[1], -(-len(rows) // devices))) * devices
        found = []
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            full = np.concatenate([part, np.repeat(part[-1:], count - len(part), axis=0)])
            found.append(np.asarray(shared(model, full))[: len(part)])
        return np.concatenate(found)

    return score


def loss_of(rows: np.ndarray) -> Loss:
    """Mean over rows, and its standard error."""
    error = float(np.std(rows, ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Loss(float(np.mean(rows)), error)
