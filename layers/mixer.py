r"""A sequence mixer: projections in, one memory per head, norm, gate and projection out.

x (time, d_model) → inputs of every head → memory → predictive mean and variance
                  → RMS norm per head → ∘ gate(x) → output (time, d_model)
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .memory import Memory, Prediction
from .norm import RootMeanSquareNorm
from .sharded import HEADS, split_axis
from .sources import GatedDecay, PerHead, Projected

Source = Projected | PerHead | GatedDecay


HEAD_NORM_EPSILON = 1e-5


class MixerState(eqx.Module):
    """What decoding carries from token to token: plain arrays."""

    memories: Any
    past: dict[str, Array | None]


class SequenceMixer(eqx.Module):
    """A layer that mixes a sequence through a memory in every head.

    Args:
        memory: one head's filter; all heads have the same, with inputs of their own.
        sources: where each input of the memory comes from.
        norm: of every head's output, with one scale for all heads; None leaves it as it is.
        gate: multiplies the normed output; None for no gate.
        out: (heads × value, d_model).
        name: what it is called.
    """

    memory: Memory
    sources: dict[str, Source]
    norm: RootMeanSquareNorm | None
    gate: Projected | None
    out: Float[Array, "channel d_model"]
    name: str = eqx.field(static=True)
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        memory: Memory,
        d_model: int,
        heads: int,
        sources: Mapping[str, Source],
        *,
        name: str = "SequenceMixer",
        norm: bool = True,
        gate: bool = True,
        rng: PRNGKeyArray,
    ) -> None:
        missing = sorted(set(memory.inputs) - set(sources))
        if missing:
            raise ValueError(
                f"`sources` give {sorted(sources)}; the memory also reads {missing}: add a source "
                "for each."
            )
        rng_gate, rng_out = jax.random.split(rng)
        width = memory.value_width
        self.memory, self.sources, self.heads, self.name = memory, dict(sources), heads, name
        self.norm = RootMeanSquareNorm(jnp.ones(width), HEAD_NORM_EPSILON) if norm else None
        self.gate = Projected(d_model, heads, (width,), jax.nn.silu, rng=rng_gate) if gate else None
        channels = heads * width
        self.out = jax.random.normal(rng_out, (channels, d_model)) / channels**0.5

    @property
    def d_model(self) -> int:
        return self.out.shape[1]

    def __call__(
        self,
        x: Float[Array, "time d_model"],
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time d_model"], Prediction]:
        """Mix a sequence.

        Args:
            x: the sequence, float32 or bfloat16.
            segment_ids: a number for the document of each token; every document is mixed as if it
                were alone.
            mask: False at padding, before or after the tokens, which writes nothing and whose
                outputs are 0.

        Returns:
            The outputs, and each head's prediction: mean (time, heads, value), variance,
            value_variance and log_evidence (time, heads).
        """
        outputs, prediction, _ = self.run(x, self.init_state(), segment_ids=segment_ids, mask=mask)
        return outputs, prediction

    def head_inputs(
        self, x: Float[Array, "time d_model"]
    ) -> dict[str, Float[Array, "time heads ..."]]:
        """What the memory of every head is given at each token, by name: keys, values, gates."""
        self._check(x, None, None)
        return self._inputs(x, self.init_state(), None, None)[0]

    def init_state(self) -> MixerState:
        """The state before the first token."""
        memories = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.heads, *leaf.shape)), self.memory.init_state()
        )
        return MixerState(
            memories, {name: source.init_state() for name, source in self.sources.items()}
        )

    def run(
        self,
        x: Float[Array, "time d_model"],
        state: MixerState,
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time d_model"], Prediction, MixerState]:
        """Mix a sequence that goes on from `state`; also return the state after it."""
        self._check(x, segment_ids, mask)
        u, past = self._inputs(x, state, segment_ids, mask)

        def head(u, state):
            return self.memory(u, state, segment_ids=segment_ids, mask=mask)

        side_by_side = jax.vmap(
            head, in_axes=(1, 0), out_axes=(1, 0), spmd_axis_name=split_axis(HEADS, self.heads)
        )
        prediction, memories = side_by_side(u, state.memories)
        outputs = self._read_out(x, prediction.mean)
        if mask is not None:
            outputs = jnp.where(mask[:, None], outputs, 0)
        return outputs, prediction, MixerState(memories, past)

    def step(
        self, x: Float[Array, " d_model"], state: MixerState
    ) -> tuple[Float[Array, " d_model"], MixerState]:
        """Decode one token: the same output as the full pass, to rounding."""
        outputs, _, state = self.predict_step(x, state)
        return outputs, state

    def predict_step(
        self, x: Float[Array, " d_model"], state: MixerState
    ) -> tuple[Float[Array, " d_model"], Prediction, MixerState]:
        """`step`, with each head's prediction."""
        if x.shape != (self.d_model,):
            raise ValueError(f"`x` is {x.shape}; a step takes one token, ({self.d_model},).")
        u, past = self._inputs(x[None], state, None, None)
        now = {name: array[0] for name, array in u.items()}
        prediction, memories = jax.vmap(self.memory.step)(now, state.memories)
        outputs = self._read_out(x[None], prediction.mean[None])[0]
        return outputs, prediction, MixerState(memories, past)

    def _check(self, x: Array, segment_ids: Array | None, mask: Array | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"`x` is {x.shape}; this layer takes (time, {self.d_model}), one sequence at a "
                "time: jax.vmap over a batch."
            )
        for name, array in (("segment_ids", segment_ids), ("mask", mask)):
            if array is not None and array.shape != x.shape[:1]:
                raise ValueError(
                    f"`{name}` is {array.shape}; it must be {x.shape[:1]}, one number a token."
                )

    def _inputs(self, x, state: MixerState, segment_ids, mask) -> tuple[dict, dict]:
        u, past = {}, {}
        for name, source in self.sources.items():
            u[name], past[name] = source(x, state.past[name], segment_ids, mask)
        return u, past

    def _read_out(self, x, mean: Float[Array, "time heads value"]) -> Float[Array, "time d_model"]:
        mean = mean.astype(x.dtype) if self.norm is None else self.norm(mean).astype(x.dtype)
        if self.gate is not None:
            mean = mean * self.gate(x, None)[0]
        return mean.reshape(x.shape[0], self.out.shape[0]) @ self.out.astype(x.dtype)

    def __repr__(self) -> str:
        widths = ", ".join(f"{name} {shape}" for name, shape in self.memory.inputs.items())
        return (
            f"{self.name}(d_model={self.d_model}, heads={self.heads}, inputs per head: {widths}; "
            f"{parameter_count(self):,} parameters)"
        )


def parameter_count(module: Any) -> int:
    """Numbers that training changes."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)))
