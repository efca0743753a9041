"""Language models over rows of packed documents, in few bits, and what is lost on each token."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16

from layers import Block, LanguageModel
from recall.text.corpus import MARK

Compute = Literal["float32", "bfloat16"]

_TOKENS_AT_ONCE = 8192
"""Positions whose logits exist at one time."""


class Packed(NamedTuple):
    """A batch as a model takes it.

    Args:
        inputs: tokens that are read.
        targets: the next tokens.
        segments: number of each token's document within its row.
        weights: of targets: 0 where another document begins.
        asked: targets that answer a question.
    """

    inputs: Int[Array, "row time"]
    targets: Int[Array, "row time"]
    segments: Int[Array, "row time"]
    weights: Float[Array, "row time"]
    asked: Bool[Array, "row time"]


def packed(rows: UInt16[Array, "row token"], end: int, answers: float = 1.0) -> Packed:
    """A batch of `recall.text.corpus` rows.

    Args:
        rows: marked tokens, one more than are read.
        end: the token that ends documents.
        answers: weight of tokens that answer a question; all others have 1.
    """
    rows = rows.astype(jnp.int32)
    tokens, marked = rows % MARK, rows >= MARK
    inputs, targets, asked = tokens[:, :-1], tokens[:, 1:], marked[:, 1:]
    ended = inputs == end
    segments = jnp.cumsum(ended, axis=1) - ended
    weights = jnp.where(ended, 0.0, jnp.where(asked, answers, 1.0))
    return Packed(inputs, targets, segments, weights, asked)


class Passed(NamedTuple):
    """What went through a model.

    Args:
        hidden: what the head reads.
        normed: what each block's mixer read, by number of the block.
        mixed: what it gave.
    """

    hidden: Float[Array, "row time d_model"]
    normed: dict[int, Float[Array, "row time d_model"]]
    mixed: dict[int, Float[Array, "row time d_model"]]


def run_rows(
    model: LanguageModel,
    batch: Packed,
    compute: Compute = "bfloat16",
    *,
    keep: tuple[int, ...] = (),
    lean: bool = False,
) -> Passed:
    """Rows through all blocks.

    Args:
        model: float32 weights.
        batch: what is read.
        compute: dtype of the sequence, and of products with weights.
        keep: blocks whose mixers' inputs and outputs are wanted.
        lean: whether a gradient computes each block again instead of keeping what is in it.
    """
    x = model.embedding[batch.inputs].astype(compute)  # whose gradient is then summed in float32
    normed, mixed = {}, {}

    def through(block: Block, x: Array) -> tuple[Array, Array, Array]:
        read = block.mixer_norm(x)
        given = mix(block, read, batch)
        x = x + given
        return x + block.feed(block.feed_norm(x)), read, given

    for number, block in enumerate(model.blocks):
        run = eqx.filter_checkpoint(through) if lean else through
        x, read, given = run(block, x)
        if number in keep:
            normed[number], mixed[number] = read, given
    return Passed(model.norm(x), normed, mixed)


def mix(block: Block, read: Array, batch: Packed) -> Float[Array, "row time d_model"]:
    """What a block's mixer gives for rows of its normed input."""

    def row(x, segments):
        state = block.mixer.init_state()
        return block.mixer.run(x, state, segment_ids=segments)[0]

    return jax.vmap(row)(read, batch.segments)


def head_of(model: LanguageModel) -> Float[Array, "d_model token"]:
    return model.embedding.T if model.head is None else model.head


def by_token(
    function: Callable[..., Array], *parts: Shaped[Array, "row time ..."]
) -> Float[Array, "row time"]:
    """A number for each token, from some at a time, computed again where a gradient needs it.

    Args:
        function: maps parts with one leading axis over tokens to one number each.
        parts: with leading axes row and time.
    """
    rows, time = parts[0].shape[:2]
    count = rows * time
    pieces = next(n for n in range(max(1, count // _TOKENS_AT_ONCE), count + 1) if count % n == 0)
    cut = [part.reshape(pieces, count // pieces, *part.shape[2:]) for part in parts]
    found = jax.lax.map(jax.checkpoint(lambda piece: function(*piece)), tuple(cut))
    return found.reshape(rows, time)


def log_probabilities(
    hidden: Float[Array, "token d_model"], head: Float[Array, "d_model word"]
) -> Float[Array, "token word"]:
    scores = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(scores)


def losses(
    model: LanguageModel, hidden: Float[Array, "row time d_model"], batch: Packed
) -> Float[Array, "row time"]:
    """−log probability of each target."""
    head = head_of(model)

    def some(hidden, targets):
        found = log_probabilities(hidden, head)
        return -jnp.take_along_axis(found, targets[:, None], axis=1)[:, 0]

    return by_token(some, hidden, batch.targets)


def divergences(
    model: LanguageModel,
    hidden: Float[Array, "row time d_model"],
    teacher: LanguageModel,
    taught: Float[Array, "row time d_model"],
) -> Float[Array, "row time"]:
    """KL divergence of a model's next-token distribution from its teacher's."""
    head, model_head = head_of(teacher), head_of(model)

    def some(hidden, taught):
        wanted, found = log_probabilities(taught, head), log_probabilities(hidden, model_head)
        return jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)

    return by_token(some, hidden, taught)
