r"""What a trained model is shown, disturbed: keys that overlap, and values that are noisy.

Rows stay as they are. A key's vector keeps its length and gets a part in common with all others,

$$ k_i \leftarrow \lVert k_i\rVert\,(\sqrt{c}\,e + \sqrt{1 - c}\,u_i),\quad
   u_i \perp e \text{ the direction of } k_i \text{ without } e, $$

so that two keys that were orthogonal have cosine c; a value's vector is written with Gaussian noise
as long as a share of it. Answers are scored against the vectors as they were.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .models import PairEmbedding, RecallModel, TokenEmbedding
from .tasks.catalogue import Rows
from .tasks.mad import FuzzyRecall, InContextRecall
from .tasks.zoology import Zoology

OVERLAPS = (0.5, 0.9)
NOISES = (0.5, 1.0)


class DisturbedTokens(eqx.Module):
    """A token embedding whose keys overlap and whose values are noisy.

    Args:
        embedding: as trained.
        overlap: c, above.
        noise: length of the noise, as a share of the value's vector.
        keys: first and past the last token that is a key.
        values: likewise of values.
    """

    embedding: TokenEmbedding
    overlap: Float[Array, "*run"]
    noise: Float[Array, "*run"]
    keys: tuple[int, int] = eqx.field(static=True)
    values: tuple[int, int] = eqx.field(static=True)

    @property
    def codes(self) -> int:
        """How many tokens there are."""
        return self.embedding.codes

    def __call__(self, inputs: Int[Array, " time"]) -> Float[Array, "time d_model"]:
        x = self.embedding(inputs)
        length = jnp.linalg.norm(x, axis=1, keepdims=True)
        common = jax.random.normal(jax.random.key(0), x.shape[1:])
        common = common / jnp.linalg.norm(common)
        own = x - jnp.outer(x @ common, common)
        own = own / jnp.maximum(jnp.linalg.norm(own, axis=1, keepdims=True), 1e-9)
        mixed = length * (jnp.sqrt(self.overlap) * common + jnp.sqrt(1 - self.overlap) * own)
        overlapping = _within(inputs, self.keys) & (self.overlap > 0)
        x = jnp.where(overlapping[:, None], mixed, x)
        noise = self.noise * length * _noise(inputs, x.shape[1])
        return jnp.where(_within(inputs, self.values)[:, None], x + noise, x)

    def logits(self, hidden: Float[Array, "query d_model"]) -> Float[Array, "query token"]:
        return self.embedding.logits(hidden)


class NoisyPairs(eqx.Module):
    """An embedding of pairs whose values are noisy.

    Args:
        embedding: as trained.
        noise: length of the noise, as a share of the value's vector.
    """

    embedding: PairEmbedding
    noise: Float[Array, "*run"]

    @property
    def codes(self) -> int:
        """How many keys and values there are."""
        return self.embedding.codes

    def __call__(self, inputs: Int[Array, "time 2"]) -> Float[Array, "time d_model"]:
        width = self.embedding.width
        noise = jnp.where(inputs[:, 1:] < 0, 0, self.noise * _noise(inputs, width))
        return self.embedding(inputs).at[:, width:].add(noise)

    def logits(self, hidden: Float[Array, "query d_model"]) -> Float[Array, "query value"]:
        return self.embedding.logits(hidden)


def disturbed(models: RecallModel, runs: int, rows: Rows) -> dict[str, RecallModel]:
    """Models that see the rows disturbed, by what is done to them.

    Overlapping continuous keys are rows of their own (`AssociativeRecall.overlap`), and tasks
    without keys have nothing to disturb.

    Args:
        models: of a leading axis.
        runs: how many.
        rows: what is shown.
    """
    embedding, tokens = models.embedding, _keys_and_values(rows)
    still, found = jnp.zeros(runs), {}
    if isinstance(embedding, PairEmbedding):
        for noise in NOISES:
            seen = NoisyPairs(embedding, still + noise)
            found[f"noise {noise} on values"] = replace(models, embedding=seen)
    if tokens is None or not isinstance(embedding, TokenEmbedding):
        return found
    for overlap in OVERLAPS:
        seen = DisturbedTokens(embedding, still + overlap, still, *tokens)
        found[f"overlap {overlap} of keys"] = replace(models, embedding=seen)
    for noise in NOISES:
        seen = DisturbedTokens(embedding, still, still + noise, *tokens)
        found[f"noise {noise} on values"] = replace(models, embedding=seen)
    return found


def _keys_and_values(rows: Rows) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """First and past the last token that is a key, and that is a value."""
    match rows:
        case Zoology():
            return (1, rows.vocabulary // 2), (rows.vocabulary // 2, rows.vocabulary)
        case InContextRecall():
            size = rows.vocabulary - rows.noise_vocabulary
        case FuzzyRecall():
            size = rows.vocabulary - 1
        case _:
            return None
    return (0, size // 2), (size // 2, size)


def _within(tokens: Int[Array, " time"], bounds: tuple[int, int]) -> Array:
    return (tokens >= bounds[0]) & (tokens < bounds[1])


def _noise(inputs: Int[Array, "time ..."], width: int) -> Float[Array, "time width"]:
    """Vectors of length 1 in the mean square, which a row always gets and others do not share."""
    rng = jax.random.fold_in(jax.random.key(1), jnp.sum(inputs))
    return jax.random.normal(rng, (len(inputs), width)) / width**0.5
