"""What a head writes and reads, token by token, and what it says."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mean = Float[Array, "value key"]


class Stream(eqx.Module):
    r"""A head's inputs: design model A's, $v_t = S_t k_t + e_t$, read at x_t.

    Args:
        key: directions written, (time, key); with several observations a token,
            (time, observation, key).
        value: what is written, (time, value) or (time, observation, value).
        query: x, read after the token's writes.
        noise: r, variance of each value, (time,) or (time, observation).
        log_decay: log a, one number a token or one per key; None where nothing decays.
        drift: q, variance added before each write, one number a token or one per key; None
            where nothing drifts.
        starts: True where a document starts, so that the memory is the prior again before it.
        rate: γ, the rate of `Forget`.
    """

    key: Float[Array, "time *observation key"]
    value: Float[Array, "time *observation value"]
    query: Float[Array, "time key"]
    noise: Float[Array, " time *observation"]
    log_decay: Float[Array, " time *width"] | None = None
    drift: Float[Array, " time *other_width"] | None = None
    starts: Bool[Array, " time"] | None = None
    rate: Float[Array, " time"] | None = None

    @property
    def length(self) -> int:
        return self.query.shape[0]

    @property
    def observations(self) -> int:
        """How many pairs each token writes."""
        return self.key.shape[1] if self.key.ndim == 3 else 1


class Belief(eqx.Module):
    """A belief about a memory whose rows share their uncertainty.

    Args:
        mean: M.
        covariance: (key, key) for `Exact`, `Restored` and `Forget`; variances (key,) for
            `Diagonal` and `Additive`; one variance () for `Isotropic`; None for `Reset`, which
            keeps none.
    """

    mean: Mean
    covariance: Float[Array, "*covariance"] | None


class Reading(eqx.Module):
    """What a head says at each token, or at one.

    Args:
        mean: M x.
        variance: x P x, how unsure every entry of the mean is.
        log_evidence: log density of the token's values given those before; 0 where the model
            sees no values (`Additive`).
    """

    mean: Float[Array, "*time value"]
    variance: Float[Array, "*time"]
    log_evidence: Float[Array, "*time"]


def per_key(width: Float[Array, " time *width"]) -> Float[Array, "time broad"]:
    """A rate as (time, 1) or (time, key)."""
    return width[:, None] if width.ndim == 1 else width


def one_by_one(stream: Stream) -> Stream:
    """The same memory with one write a token: time passes and documents start at the first."""
    count = stream.observations
    if stream.key.ndim == 2:
        return stream
    time = stream.length

    def first(array, filler):
        rest = jnp.full((time, count - 1, *array.shape[1:]), filler, array.dtype)
        return jnp.concatenate([array[:, None], rest], axis=1).reshape(-1, *array.shape[1:])

    def last(array):
        rest = jnp.zeros((time, count - 1, *array.shape[1:]), array.dtype)
        return jnp.concatenate([rest, array[:, None]], axis=1).reshape(-1, *array.shape[1:])

    noise = stream.noise[:, None] if stream.noise.ndim == 1 else stream.noise
    noise = jnp.broadcast_to(noise, (time, count)).reshape(-1)
    return Stream(
        stream.key.reshape(-1, stream.key.shape[-1]),
        stream.value.reshape(-1, stream.value.shape[-1]),
        last(stream.query),
        noise,
        None if stream.log_decay is None else first(stream.log_decay, 0),
        None if stream.drift is None else first(stream.drift, 0),
        None if stream.starts is None else first(stream.starts, False),
        None if stream.rate is None else first(stream.rate, 1),
    )


def by_token(reading: Reading, observations: int) -> Reading:
    """Readings of `one_by_one` after each token's last write; log evidence summed."""
    if observations == 1:
        return reading
    return Reading(
        reading.mean[observations - 1 :: observations],
        reading.variance[observations - 1 :: observations],
        reading.log_evidence.reshape(-1, observations).sum(axis=1),
    )
