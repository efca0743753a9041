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
from .packing import at_padding, document_starts, without_padding
from .precision import cast, state_dtype
from .rules import Exact, Reset
from .stream import Belief
from .variances import moebius_scan

_TOGETHER = 64
"""Tokens of a block, at most."""


class Entries(eqx.Module):
    """What every entry of a memory goes through: (time, value, key), or broadcast to it.

    Args:
        key: what the entry is multiplied by.
        value: what it is seen as.
        query: what it is read by.
        noise: of its value.
        decay: of the entry; None where nothing decays.
        drift: alike.
        starts: where documents start.
    """

    key: Float[Array, "*blocks time #value key"]
    value: Float[Array, "*blocks time value #key"]
    query: Float[Array, "*blocks time key"]
    noise: Float[Array, "*blocks time value #key"]
    decay: Float[Array, "*blocks time value key"] | None
    drift: Float[Array, "*blocks time value key"] | None
    starts: Bool[Array, "*blocks time"] | None


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
        kept = None if isinstance(self.rule, Reset) else jnp.full(shape, self.prior_variance, float)
        return Belief(jnp.zeros(shape), kept)

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        starts = None if segment_ids is None else document_starts(segment_ids, mask)
        u = cast(dict(u), state_dtype(u["key"], state.mean))
        own, decay = u["noise"], u.get("log_decay")
        noise = own[:, :, None]
        if isinstance(self.rule, Reset):
            squares = u["key"] ** 2
            others = jnp.sum(squares, axis=-1, keepdims=True) - squares
            noise = noise + self.rule.variance * others[:, None]
        entries = Entries(
            u["key"][:, None],
            u["value"][:, :, None],
            u["query"],
            noise,
            None if decay is None else jnp.exp(decay),
            u.get("drift"),
            starts,
        )
        prediction, state = entry_scan(entries, state, self.prior_variance, self.rule, mask)
        value_variance = prediction.variance + (own if mask is None else at_padding(own, mask, 0))
        return replace(prediction, value_variance=value_variance), state

    def step(self, u, state):
        prediction, state = self({name: array[None] for name, array in u.items()}, state)
        return jax.tree.map(lambda part: part[0], prediction), state


def entry_scan(
    entries: Entries,
    state: Belief,
    prior_variance: Float[Array, "value key"] | float,
    rule: Exact | Reset,
    mask: Bool[Array, " time"] | None = None,
) -> tuple[Prediction, Belief]:
    """Predictions of every token, of which `value_variance` is `variance`, and the last belief.

    Args:
        entries: what they go through.
        state: mean and variances (value, key); no variances under `Reset`.
        prior_variance: of every entry, where documents start.
        rule: what is done to the variances.
        mask: False at padding.
    """
    if mask is not None:
        entries = replace(without_padding(entries, mask), decay=at_padding(entries.decay, mask, 1))
    time = entries.query.shape[0]
    if time == 0:
        empty = jnp.zeros((0, state.mean.shape[0]), state.mean.dtype)
        return Prediction(empty, empty, empty, empty.sum(axis=1)), state
    length = min(time, _TOGETHER)
    blocks = jax.tree.map(lambda array: cut(array, length), entries)
    blocks = replace(blocks, noise=cut(entries.noise, length, 1))
    if entries.decay is not None:
        blocks = replace(blocks, decay=cut(entries.decay, length, 1))

    @jax.checkpoint
    def body(belief, block):
        return _through_block(belief, block, prior_variance, rule)

    state, prediction = jax.lax.scan(body, state, blocks)
    prediction = jax.tree.map(lambda part: join(part, time), prediction)
    return silent_at_padding(prediction, mask), state


def _through_block(
    belief: Belief, block: Entries, prior_variance: Float[Array, "value key"] | float, rule
) -> tuple[Belief, Prediction]:
    time, shape = len(block.query), belief.mean.shape

    def flat(part):
        return jnp.broadcast_to(part, (time, *shape)).reshape(time, -1)

    key, value, noise = flat(block.key), flat(block.value), flat(block.noise)
    decay = flat(1.0 if block.decay is None else block.decay)
    if isinstance(rule, Reset):
        before = jnp.full(noise.shape, rule.variance)
        after = before * noise / (noise + key**2 * before)
    else:
        drift = flat(0.0 if block.drift is None else block.drift)
        assert belief.covariance is not None
        start = Belief(belief.mean, belief.covariance.ravel())
        prior = Belief(belief.mean, jnp.broadcast_to(prior_variance, shape).ravel())
        before, after = moebius_scan(decay**2, drift, key**2 / noise, block.starts, start, prior)
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
    mean = (kept * means + written).reshape(time, *shape)
    variance = after.reshape(time, *shape)
    read = jnp.sum(mean * block.query[:, None], axis=-1)
    unsure = jnp.sum(variance * block.query[:, None] ** 2, axis=-1)
    last = None if isinstance(rule, Reset) else variance[-1]
    return Belief(mean[-1], last), Prediction(read, unsure, unsure, evidence)
