r"""Models that are trained on recall: an embedding, blocks of mixers, and scores where one asks.

Tokens take Zoology's model: the mixer follows a gated short convolution, each in a block

$$ x \leftarrow x + \mathrm{mix}(\mathrm{norm}(x)),\quad x \leftarrow x + \mathrm{norm}(x) $$

(the second line is upstream's identity in place of a feed-forward layer), and the head is the
embedding. Embeddings and all projections, the mixer's too, begin as normal numbers of deviation
0.02, as upstream's. Pairs of vectors take one mixer without any convolution, whose output is
compared with the vectors of all values.

Source: Arora et al. (2023), arXiv 2312.04927; HazyResearch/zoology, `model.py`, `base_conv.py`.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from layers.memory import Prediction
from layers.mixer import SequenceMixer
from layers.sources import Projected, ShortConvolution

from .tasks.associative import directions

_DEVIATION = 0.02
"""Of initial embeddings and projections, as upstream's."""

Mixer = Callable[[Float[Array, "time d_model"]], tuple[Float[Array, "time d_model"], Any]]
"""x -> (outputs, the memory's prediction or None); a module, as `layers.SequenceMixer`."""
MakeMixer = Callable[[int, PRNGKeyArray], Mixer]
"""(d_model, rng) -> mixer."""


class Answer(eqx.Module):
    """What a model says where it is asked.

    Args:
        logits: scores of every token or value.
        variance: of the memory's read-out, mean over heads and entries; None where it has none.
        prediction: of the last block's memory, head by head; None where it has none.
    """

    logits: Float[Array, "query code"]
    variance: Float[Array, " query"] | None
    prediction: Prediction | None


class GatedConvolution(eqx.Module):
    """conv(x) ∘ (W x + b) + x, with a causal convolution of every channel over three tokens."""

    convolution: ShortConvolution
    offset: Float[Array, " d_model"]
    projection: eqx.nn.Linear

    def __init__(self, d_model: int, *, rng: PRNGKeyArray) -> None:
        rng_taps, rng_offset, rng_projection = jax.random.split(rng, 3)
        bound = 3**-0.5
        self.convolution = ShortConvolution(d_model, 3, rng=rng_taps)
        self.offset = jax.random.uniform(rng_offset, (d_model,), minval=-bound, maxval=bound)
        linear = eqx.nn.Linear(d_model, d_model, key=rng_projection)
        weight = _DEVIATION * jax.random.normal(rng_projection, linear.weight.shape)
        self.projection = eqx.tree_at(
            lambda one: (one.weight, one.bias), linear, (weight, jnp.zeros(d_model))
        )

    def __call__(
        self, x: Float[Array, "time d_model"]
    ) -> tuple[Float[Array, "time d_model"], None]:
        mixed = self.convolution(x, self.convolution.init_state())[0] + self.offset
        return mixed * jax.vmap(self.projection)(x) + x, None


class SoftmaxAttention(eqx.Module):
    """Causal attention with rotary positions: the ceiling that no fixed state reaches."""

    attention: eqx.nn.MultiheadAttention
    rotation: eqx.nn.RotaryPositionalEmbedding

    def __init__(self, d_model: int, heads: int, *, rng: PRNGKeyArray) -> None:
        self.attention = eqx.nn.MultiheadAttention(heads, d_model, key=rng)
        self.rotation = eqx.nn.RotaryPositionalEmbedding(d_model // heads)

    def __call__(
        self, x: Float[Array, "time d_model"]
    ) -> tuple[Float[Array, "time d_model"], None]:
        def rotate(query, key, value):
            turn = jax.vmap(self.rotation, in_axes=1, out_axes=1)
            return turn(query), turn(key), value

        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        return self.attention(x, x, x, mask, process_heads=rotate), None


@runtime_checkable
class Embedding(Protocol):
    """A module: vectors of what is shown, and scores of what comes out."""

    @property
    def codes(self) -> int:
        """How many answers there are."""
        ...

    def __call__(self, inputs: Any) -> Float[Array, "time d_model"]: ...

    def logits(self, hidden: Any) -> Float[Array, "query code"]: ...


class TokenEmbedding(eqx.Module):
    """A learned vector for every token; the head is its transpose."""

    table: Float[Array, "token d_model"]

    @property
    def codes(self) -> int:
        """How many tokens there are."""
        return self.table.shape[-2]  # one model's, or several side by side

    def __call__(self, inputs: Int[Array, " time"]) -> Float[Array, "time d_model"]:
        return self.table[inputs]

    def logits(self, hidden: Float[Array, "query d_model"]) -> Float[Array, "query token"]:
        return hidden @ self.table.T


class PairEmbedding(eqx.Module):
    """Unit vectors, never trained, of a key and of the value written with it, side by side.

    Args:
        codes: how many keys and values there are.
        width: of a vector.
        overlap: cosine between keys.
        seed: of the vectors.
    """

    codes: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    overlap: float = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __call__(self, inputs: Int[Array, "time 2"]) -> Float[Array, "time d_model"]:
        key, value = inputs[:, 0], inputs[:, 1]
        keys = self._table(self.overlap, self.seed)[key]
        values = jnp.where(value[:, None] < 0, 0, self._table(0.0, self.seed + 1)[value])
        return jnp.concatenate([keys, values], axis=-1)

    def logits(self, hidden: Float[Array, "query d_model"]) -> Float[Array, "query value"]:
        return hidden[:, self.width :] @ self._table(0.0, self.seed + 1).T

    def _table(self, overlap: float, seed: int) -> Float[Array, "code width"]:
        return jnp.asarray(directions(self.codes, self.width, overlap, seed), jnp.float32)


class Block(eqx.Module):
    """A mixer of a normed sequence, added to it, and the sum's norm added once more."""

    norm: eqx.nn.LayerNorm
    mixer: Any
    after: eqx.nn.LayerNorm

    def __init__(self, mixer: Mixer, d_model: int) -> None:
        self.norm, self.after = eqx.nn.LayerNorm(d_model), eqx.nn.LayerNorm(d_model)
        self.mixer = mixer

    def __call__(self, x: Float[Array, "time d_model"]) -> tuple[Float[Array, "time d_model"], Any]:
        mixed, prediction = self.mixer(jax.vmap(self.norm)(x))
        x = x + mixed
        return x + jax.vmap(self.after)(x), prediction


class RecallModel(eqx.Module):
    """An embedding, blocks, a norm, and scores at the places that are asked for.

    Args:
        embedding: of what is shown, and scores of what comes out.
        blocks: in order.
        norm: before the head.
        dropout: share of embedded numbers that training sets to 0.
    """

    embedding: Embedding
    blocks: tuple[Block, ...]
    norm: eqx.nn.LayerNorm
    dropout: float = eqx.field(static=True)

    def __call__(
        self,
        inputs: Int[Array, "time ..."],
        places: Int[Array, " query"],
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Answer:
        """Scores at `places`; `rng` is for dropout, in training."""
        x = self.embedding(inputs)
        if rng is not None and self.dropout > 0:
            kept = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        variances, prediction = [], None
        for block in self.blocks:
            x, prediction = block(x)
            if prediction is not None:
                prediction = jax.tree.map(lambda part: part[places], prediction)
                spread = prediction.variance
                variances.append(spread.reshape(len(places), -1).mean(axis=1))
        variance = jnp.mean(jnp.stack(variances), axis=0) if variances else None
        logits = self.embedding.logits(jax.vmap(self.norm)(x[places]))
        return Answer(logits, variance, prediction)


def token_model(
    vocabulary: int,
    d_model: int,
    make_mixer: MakeMixer,
    *,
    dropout: float = 0.1,
    rng: PRNGKeyArray,
) -> RecallModel:
    """Zoology's model of two blocks: a gated convolution, then the mixer."""
    rng_table, rng_convolution, rng_mixer, rng_small = jax.random.split(rng, 4)
    return RecallModel(
        TokenEmbedding(_DEVIATION * jax.random.normal(rng_table, (vocabulary, d_model))),
        (
            Block(GatedConvolution(d_model, rng=rng_convolution), d_model),
            Block(_with_small_projections(make_mixer(d_model, rng_mixer), rng_small), d_model),
        ),
        eqx.nn.LayerNorm(d_model),
        dropout,
    )


def _with_small_projections(mixer: Mixer, rng: PRNGKeyArray) -> Mixer:
    """A mixer whose every matrix that is multiplied with the sequence is drawn as upstream's."""

    def matrices(mixer: Any) -> list[Any]:
        layers = jax.tree.leaves(mixer, is_leaf=_projects)
        found = [part for one in layers if _projects(one) for part in _matrices(one)]
        return [*found, mixer.out] if isinstance(mixer, SequenceMixer) else found

    now = matrices(mixer)
    drawn = [
        _DEVIATION * jax.random.normal(one_rng, matrix.shape)
        for one_rng, matrix in zip(jax.random.split(rng, len(now)), now, strict=True)
    ]
    return eqx.tree_at(matrices, mixer, drawn)


def _projects(node: Any) -> bool:
    return isinstance(node, Projected | eqx.nn.Linear)


def _matrices(node: Projected | eqx.nn.Linear) -> list[Any]:
    down = node.down if isinstance(node, Projected) else None
    return [node.weight] if down is None else [down, node.weight]


def pair_model(
    codes: int, width: int, overlap: float, seed: int, make_mixer: MakeMixer, *, rng: PRNGKeyArray
) -> RecallModel:
    """One mixer over pairs of vectors of `width` numbers each."""
    embedding = PairEmbedding(codes, width, overlap, seed)
    block = Block(make_mixer(2 * width, rng), 2 * width)
    return RecallModel(embedding, (block,), eqx.nn.LayerNorm(2 * width), 0.0)
