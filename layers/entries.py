r"""Design model C: every entry of the memory is a scalar filter that sees its row's value alone.

$$ p^- = a^2 p + q,\quad g = \frac{p^- k_j}{k_j^2 p^- + r_i},\quad
   m = a m + g\,(v_i - k_j a m),\quad y_i = \sum_j x_j m_{ij} $$

Variances compose as Möbius maps and means as affine ones, so both are parallel in time. The memory
takes (time, value, key) numbers; blocks of tokens are kept one at a time.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .additive import chunk_states
from .chunks import cut, join
from .memory import Prediction, silent_at_padding
from .packing import at_padding, document_starts
from .precision import state_dtype
from .rules import Exact, Reset
from .stream import Belief
from .variances import moebius_scan

_TOGETHER = 64


class Entries(eqx.Module):
    """What every entry of a memory goes through: (time, value, key), or broadcast to it."""

    key: Float[Array, "time key"]
    value: Float[Array, "time value"]
    query: Float[Array, "time key"]
    noise: Float[Array, "time value"]
    log_decay: Float[Array, "time value key"] | None
    drift: Float[Array, "time value key"] | None
    starts: Bool[Array, " time"] | None


class EntryMemory(eqx.Module):
    r"""A memory of independent entries: Kalman Linear Attention (`Exact`), Longhorn (`Reset`).

    Inputs a token: `key`, `value`, `query`, `noise` (value,), and under `Exact` `log_decay` and
    `drift`, (value, key). Under `Reset` the other entries of a row count as noise, so the gain is
    k_j Δ_i with Δ_i = σ²/(r_i + σ²‖k‖²) (`design_models.independent_entries_with_crosstalk`).
    """

    value_width: int = eqx.field(static=True)
    key_width: int = eqx.field(static=True)
    rule: Exact | Reset = eqx.field(static=True, default=Exact())
    prior_variance: float = eqx.field(static=True, default=1.0)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        entry = (self.value_width, self.key_width)
        widths = {"key": entry[1:], "value": entry[:1], "query": entry[1:], "noise": entry[:1]}
        if isinstance(self.rule, Exact):
            widths |= {"log_decay": entry, "drift": entry}
        return widths

    def init_state(self) -> Belief:
        shape = (self.value_width, self.key_width)
        kept = None if isinstance(self.rule, Reset) else jnp.full(shape, self.prior_variance)
        return Belief(jnp.zeros(shape), kept)

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        starts = None if segment_ids is None else document_starts(segment_ids, mask)
        entries = Entries(
            u["key"],
            u["value"],
            u["query"],
            u["noise"],
            u.get("log_decay"),
            u.get("drift"),
            starts,
        )
        dtype = state_dtype(u["key"], state.mean)
        entries = jax.tree.map(
            lambda part: part if part.dtype == bool else part.astype(dtype), entries
        )
        if mask is not None:
            entries = _without_padding(entries, mask)
        time = u["query"].shape[0]
        if time == 0:
            empty = jnp.zeros((0, self.value_width))
            return Prediction(empty, empty, empty, jnp.zeros(0)), state
        blocks = jax.tree.map(lambda array: cut(array, _TOGETHER), entries)
        padded = cut(entries.noise, _TOGETHER, 1)
        blocks = eqx.tree_at(lambda blocks: blocks.noise, blocks, padded)

        @jax.checkpoint
        def body(belief, block):
            return self._block(belief, block)

        state, prediction = jax.lax.scan(body, state, blocks)
        prediction = jax.tree.map(lambda part: join(part, time), prediction)
        return silent_at_padding(prediction, mask), state

    def step(self, u, state):
        prediction, state = self({name: array[None] for name, array in u.items()}, state)
        return jax.tree.map(lambda part: part[0], prediction), state

    def _block(self, belief: Belief, block: Entries) -> tuple[Belief, Prediction]:
        time = block.key.shape[0]
        shape = (time, self.value_width, self.key_width)
        key = jnp.broadcast_to(block.key[:, None], shape).reshape(time, -1)
        noise = jnp.broadcast_to(block.noise[:, :, None], shape)
        value = jnp.broadcast_to(block.value[:, :, None], shape).reshape(time, -1)
        zero = jnp.zeros(shape)
        decay = jnp.exp(zero if block.log_decay is None else block.log_decay).reshape(time, -1)
        if isinstance(self.rule, Reset):
            others = jnp.sum(block.key**2, axis=-1, keepdims=True) - block.key**2
            noise = (noise + self.rule.variance * others[:, None]).reshape(time, -1)
            before = jnp.full(noise.shape, self.rule.variance)
            after = before * noise / (noise + key**2 * before)
        else:
            noise = noise.reshape(time, -1)
            drift = (zero if block.drift is None else block.drift).reshape(time, -1)
            assert belief.covariance is not None
            flat = Belief(belief.mean, belief.covariance.ravel())
            prior = Belief(belief.mean, jnp.asarray(self.prior_variance))
            before, after = moebius_scan(decay**2, drift, key**2 / noise, block.starts, flat, prior)
        innovation_variance = key**2 * before + noise
        gain = before * key / innovation_variance
        kept = decay * (1 - gain * key)
        if block.starts is not None:
            kept = jnp.where(block.starts[:, None], 0, kept)
        written = gain * value
        _, means = chunk_states(belief.mean.ravel(), kept, written, "parallel")
        carried = means * decay
        if block.starts is not None:
            carried = jnp.where(block.starts[:, None], 0, carried)
        innovation = value - key * carried
        evidence = -0.5 * jnp.sum(
            innovation**2 / innovation_variance + jnp.log(2 * jnp.pi * innovation_variance), axis=-1
        )
        mean = (kept * means + written).reshape(shape)
        variance = after.reshape(shape)
        read = jnp.sum(mean * block.query[:, None], axis=-1)
        unsure = jnp.sum(variance * block.query[:, None] ** 2, axis=-1)
        prediction = Prediction(read, unsure, unsure + block.noise, evidence)
        kept = None if isinstance(self.rule, Reset) else variance[-1]
        return Belief(mean[-1], kept), prediction


def _without_padding(entries: Entries, mask: Bool[Array, " time"]) -> Entries:
    return replace(
        entries,
        key=at_padding(entries.key, mask, 0),
        value=at_padding(entries.value, mask, 0),
        query=at_padding(entries.query, mask, 0),
        noise=at_padding(entries.noise, mask, 1),
        log_decay=at_padding(entries.log_decay, mask, 0),
        drift=at_padding(entries.drift, mask, 0),
    )
