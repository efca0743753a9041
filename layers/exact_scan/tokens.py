"""What the exact scan is given and what it returns."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..chunks import document_starts

Scalar = Float[Array, ""]


class Tokens(eqx.Module):
    r"""One sequence for one memory; a token may hold several observations.

    Args:
        query: direction read after the token's writes.
        key: direction written; need not be normalised.
        value: what was seen along `key`.
        noise: variance $r_t > 0$ of `value`; with several observations one for each, or one for all.
        decay: $a_t$ in [0, 1], before the token's writes; None: no decay.
        drift: process noise variance $q_t \ge 0$, after the decay; None: no drift.
        segment: document of each token; where it changes, the memory is the initial one again.
        mask: True for real tokens. A padded token neither decays nor writes, whatever it holds, and
            its prediction is 0.
    """

    query: Float[Array, "time key"]
    key: Float[Array, "time key"] | Float[Array, "time observation key"]
    value: Float[Array, "time value"] | Float[Array, "time observation value"]
    noise: Float[Array, " time"] | Float[Array, "time observation"]
    decay: Float[Array, " time"] | Float[Array, "time key"] | None = None
    drift: Float[Array, " time"] | Float[Array, "time key"] | None = None
    segment: Int[Array, " time"] | None = None
    mask: Bool[Array, " time"] | None = None


class State(eqx.Module):
    """Belief about the memory: each of its rows has mean `mean[row]` and this one covariance."""

    mean: Float[Array, "value key"]
    covariance: Float[Array, "key key"]


class Prediction(eqx.Module):
    """What each token's read-out says of the value, and how surprising the values written were.

    Args:
        mean: M x after the token's writes, in the values' dtype.
        variance: xᵀPx of every entry, without observation noise.
        log_evidence: log density of the token's values, given all before.
    """

    mean: Float[Array, "time value"]
    variance: Float[Array, " time"]
    log_evidence: Float[Array, " time"]


class Restoration(eqx.Module):
    r"""The covariance before each write becomes $\lambda P + (1-\lambda)\sigma^2 I$.

    Every observation of a token counts as a write.

    Args:
        kept: λ in [0, 1]; 1 is the exact filter, 0 the delta rule.
        variance: σ².
    """

    kept: Scalar
    variance: Scalar


class Steps(eqx.Module):
    """Tokens as the recurrence sees them: one observation a step, padding made inert.

    Before step t's observation, mean ← mean·decay and
    covariance ← kept·decay·covariance·decay + drift, from the initial state where `reset`.
    `width` and `wide` are 1 or the key width.
    """

    query: Float[Array, "time key"]
    key: Float[Array, "time key"]
    value: Float[Array, "time value"]
    noise: Float[Array, " time"]
    decay: Float[Array, "time width"]
    drift: Float[Array, "time wide"] | None
    kept: Float[Array, " time"] | None
    reset: Bool[Array, " time"] | None


def check(tokens: Tokens, initial: State) -> None:
    """Raise ValueError where shapes disagree."""
    time, key_width = tokens.query.shape
    value_width = tokens.value.shape[-1]
    several = tokens.key.ndim == 3
    seen = (time, tokens.key.shape[1]) if several else (time,)
    shared = [] if not several else [(time,)]
    rates = [(time,), (time, key_width)]
    allowed = {
        "key": (tokens.key, [(*seen, key_width)]),
        "value": (tokens.value, [(*seen, value_width)]),
        "noise": (tokens.noise, [seen, *shared]),
        "decay": (tokens.decay, rates),
        "drift": (tokens.drift, rates),
        "segment": (tokens.segment, [(time,)]),
        "mask": (tokens.mask, [(time,)]),
        "initial.mean": (initial.mean, [(value_width, key_width)]),
        "initial.covariance": (initial.covariance, [(key_width, key_width)]),
    }
    for name, (array, shapes) in allowed.items():
        if array is not None and array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"`{name}` is {array.shape}; for queries {tokens.query.shape}, values "
                f"{tokens.value.shape} it must be {wanted}."
            )
    if several and tokens.key.shape[1] == 0:
        raise ValueError(f"`key` is {tokens.key.shape}; a token needs at least 1 observation.")


def working_dtype(tokens: Tokens, initial: State) -> jnp.dtype:
    """Float32, or float64 where an input is."""
    floats = [tokens.query, tokens.key, tokens.value, tokens.noise, tokens.decay, tokens.drift]
    floats += [initial.mean, initial.covariance]
    wide = any(array is not None and array.dtype == jnp.float64 for array in floats)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def expand(tokens: Tokens, restoration: Restoration | None, dtype: jnp.dtype) -> Steps:
    """Write tokens out as steps of one observation: time passes before a token's first only."""
    seen = 1 if tokens.key.ndim == 2 else tokens.key.shape[1]
    time = tokens.query.shape[0]

    def each(array, padding):
        """(time, observation, ...) to (step, ...), padded tokens replaced."""
        array = _where_real(tokens.mask, array.astype(dtype), padding)
        return array.reshape(time * seen, *array.shape[2:])

    def only(array, at, otherwise):
        """(time, ...) to (step, ...), given to one observation of each token."""
        chosen = (jnp.arange(seen) == at).reshape(1, seen, *[1] * (array.ndim - 1))
        array = jnp.where(chosen, array[:, None], jnp.asarray(otherwise, array.dtype))
        return array.reshape(time * seen, *array.shape[2:])

    def rate(array, padding):
        array = _where_real(tokens.mask, array.astype(dtype), padding)
        return only(array.reshape(time, -1), 0, padding)

    grouped = tokens.key.ndim == 3
    key, value = (x if grouped else x[:, None] for x in (tokens.key, tokens.value))
    noise = tokens.noise if tokens.noise.ndim == 2 else tokens.noise[:, None]
    noise = jnp.broadcast_to(noise, (time, seen))
    query = _where_real(tokens.mask, tokens.query.astype(dtype), 0)
    decay = jnp.ones((time * seen, 1), dtype) if tokens.decay is None else rate(tokens.decay, 1)
    drift = None if tokens.drift is None else rate(tokens.drift, 0)
    kept = None
    if restoration is not None:
        kept = jnp.broadcast_to(restoration.kept.astype(dtype), (time, seen))
        kept = each(kept, 1)
        restored = (1 - kept[:, None]) * restoration.variance.astype(dtype)
        drift = restored if drift is None else kept[:, None] * drift + restored
    reset = None
    if tokens.segment is not None:
        reset = only(document_starts(tokens.segment, tokens.mask), 0, False)
    return Steps(
        query=only(query, seen - 1, 0),
        key=each(key, 0),
        value=each(value, 0),
        noise=each(noise, 1),
        decay=decay,
        drift=drift,
        kept=kept,
        reset=reset,
    )


def collect(
    means: Float[Array, "step value"],
    variances: Float[Array, " step"],
    log_evidences: Float[Array, " step"],
    tokens: Tokens,
) -> Prediction:
    """Gather a token's steps: read at its last observation, evidence of all."""
    time = tokens.query.shape[0]
    seen = 1 if tokens.key.ndim == 2 else tokens.key.shape[1]
    log_evidence = log_evidences.reshape(time, seen).sum(1)
    return Prediction(
        mean=means.reshape(time, seen, -1)[:, -1].astype(tokens.value.dtype),
        variance=variances.reshape(time, seen)[:, -1],
        log_evidence=_where_real(tokens.mask, log_evidence, 0),
    )


def _where_real(mask: Bool[Array, " time"] | None, array: Array, padding: float) -> Array:
    if mask is None:
        return array
    real = mask.reshape(mask.shape + (1,) * (array.ndim - 1))
    return jnp.where(real, array, jnp.asarray(padding, array.dtype))
