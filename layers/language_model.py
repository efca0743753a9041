r"""A residual block and a small language model around any sequence mixer.

h = x + mixer(norm(x)),   x' = h + W_down (silu(W_gate norm(h)) ∘ W_up norm(h))
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .memory import Prediction
from .mixer import MixerState, SequenceMixer, parameter_count
from .norm import RootMeanSquareNorm

MakeMixer = Callable[[PRNGKeyArray], SequenceMixer]


NORM_EPSILON = 1e-6


class GatedFeedForward(eqx.Module):
    """SwiGLU (Shazeer, 2020, arXiv 2002.05202)."""

    gate: Float[Array, "d_model hidden"]
    up: Float[Array, "d_model hidden"]
    down: Float[Array, "hidden d_model"]

    def __init__(self, d_model: int, hidden: int, *, rng: PRNGKeyArray) -> None:
        rngs = jax.random.split(rng, 3)
        self.gate = jax.random.normal(rngs[0], (d_model, hidden)) / math.sqrt(d_model)
        self.up = jax.random.normal(rngs[1], (d_model, hidden)) / math.sqrt(d_model)
        self.down = jax.random.normal(rngs[2], (hidden, d_model)) / math.sqrt(hidden)

    def __call__(self, x: Float[Array, "*time d_model"]) -> Float[Array, "*time d_model"]:
        gate, up, down = (part.astype(x.dtype) for part in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Block(eqx.Module):
    """A mixer and a feed-forward layer, each behind a norm and beside an identity."""

    mixer_norm: RootMeanSquareNorm
    mixer: SequenceMixer
    feed_norm: RootMeanSquareNorm
    feed: GatedFeedForward

    def __init__(self, mixer: SequenceMixer, *, hidden: int | None = None, rng: PRNGKeyArray):
        d_model = mixer.d_model
        hidden = 4 * d_model if hidden is None else hidden
        self.mixer_norm = RootMeanSquareNorm(jnp.ones(d_model), NORM_EPSILON)
        self.mixer = mixer
        self.feed_norm = RootMeanSquareNorm(jnp.ones(d_model), NORM_EPSILON)
        self.feed = GatedFeedForward(d_model, hidden, rng=rng)

    def __call__(
        self,
        x: Float[Array, "time d_model"],
        state: MixerState | None = None,
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time d_model"], Prediction, MixerState]:
        """Outputs, the mixer's predictions, and its state after the last token."""
        state = self.mixer.init_state() if state is None else state
        mixed, prediction, state = self.mixer.run(
            self.mixer_norm(x), state, segment_ids=segment_ids, mask=mask
        )
        x = x + mixed
        return x + self.feed(self.feed_norm(x)), prediction, state

    def step(
        self, x: Float[Array, " d_model"], state: MixerState
    ) -> tuple[Float[Array, " d_model"], Prediction, MixerState]:
        """One token."""
        mixed, prediction, state = self.mixer.predict_step(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.feed(self.feed_norm(x)), prediction, state


class LanguageModel(eqx.Module):
    """Token embedding, blocks, norm, and a head that is the embedding's transpose where tied.

    Args of the constructor:
        vocabulary: number of tokens.
        d_model: width of the sequence.
        depth: number of blocks.
        make_mixer: `make_mixer(rng) -> SequenceMixer`, called once for each block.
        hidden: width of the feed-forward layers; 4 × d_model where left out.
        tied: whether the head is the embedding.
    """

    embedding: Float[Array, "token d_model"]
    blocks: tuple[Block, ...]
    norm: RootMeanSquareNorm
    head: Float[Array, "d_model token"] | None

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        depth: int,
        make_mixer: MakeMixer,
        *,
        hidden: int | None = None,
        tied: bool = True,
        rng: PRNGKeyArray,
    ) -> None:
        rng_embedding, rng_head, *rngs = jax.random.split(rng, depth + 2)
        self.embedding = 0.02 * jax.random.normal(rng_embedding, (vocabulary, d_model))
        blocks = []
        for rng_block in rngs:
            rng_mixer, rng_feed = jax.random.split(rng_block)
            blocks.append(Block(make_mixer(rng_mixer), hidden=hidden, rng=rng_feed))
        self.blocks = tuple(blocks)
        self.norm = RootMeanSquareNorm(jnp.ones(d_model), NORM_EPSILON)
        self.head = None if tied else 0.02 * jax.random.normal(rng_head, (d_model, vocabulary))

    def __call__(
        self,
        tokens: Int[Array, " time"],
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time token"], tuple[Prediction, ...]]:
        """Logits of the next token, and every block's predictions."""
        hidden, predictions, _ = self.hidden(tokens, segment_ids=segment_ids, mask=mask)
        return self.logits(hidden), predictions

    def hidden(
        self,
        tokens: Int[Array, " time"],
        states: tuple[MixerState, ...] | None = None,
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time d_model"], tuple[Prediction, ...], tuple[MixerState, ...]]:
        """What the head reads: for logits at few positions, or to go on from `states`."""
        states = self.init_state() if states is None else states
        x = self.embedding[tokens]
        predictions, later = [], []
        for block, state in zip(self.blocks, states, strict=True):
            x, prediction, state = block(x, state, segment_ids=segment_ids, mask=mask)
            predictions.append(prediction)
            later.append(state)
        return self.norm(x), tuple(predictions), tuple(later)

    def logits(self, hidden: Float[Array, "*time d_model"]) -> Float[Array, "*time token"]:
        """Scores of every token."""
        head = self.embedding.T if self.head is None else self.head
        return hidden @ head.astype(hidden.dtype)

    def init_state(self) -> tuple[MixerState, ...]:
        """Every block's state before the first token."""
        return tuple(block.mixer.init_state() for block in self.blocks)

    def step(
        self, token: Int[Array, ""], states: tuple[MixerState, ...]
    ) -> tuple[Float[Array, " token"], tuple[MixerState, ...]]:
        """Decode one token: logits of the next, and the states after it."""
        x = self.embedding[token]
        later: list[Any] = []
        for block, state in zip(self.blocks, states, strict=True):
            x, _, state = block.step(x, state)
            later.append(state)
        return self.logits(self.norm(x)), tuple(later)

    def __repr__(self) -> str:
        vocabulary, d_model = self.embedding.shape
        mixer = self.blocks[0].mixer if self.blocks else "no mixer"
        return (
            f"LanguageModel(vocabulary={vocabulary}, d_model={d_model}, depth={len(self.blocks)}, "
            f"{parameter_count(self):,} parameters; each block: {mixer!r})"
        )
