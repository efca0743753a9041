r"""Forgetting towards the prior, in chunks of natural parameters: MesaNet's recurrence.

$$ \Lambda_t = \gamma_t \Lambda_{t-1} + (1-\gamma_t)\Lambda_0 + k_t k_t^\top/r_t,\quad
   \eta_t = \gamma_t\eta_{t-1} + v_t k_t^\top/r_t,\quad M_t = \eta_t\Lambda_t^{-1} $$

The excess Λ − Λ0 and η are decayed sums, so chunks follow each other by a scalar decay. Within a
chunk every token's precision before its write is formed and solved for its key and its query: one
K×K Cholesky a token, exact where MesaNet iterates conjugate gradients.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .additive import chunk_states
from .chunks import cut, from_start, join, ratios, to_end, whole, within_chunk
from .covariance import Algorithm
from .precision import exact_product
from .stream import Belief, Reading, Stream
from .token import log_density

_TOGETHER = 4  # chunks that are solved at once: their precisions are (chunk, token, key, key)


class _Chunk(eqx.Module):
    """What is written and read, chunk by chunk."""

    key: Float[Array, "*chunks token key"]
    value: Float[Array, "*chunks token value"]
    query: Float[Array, "*chunks token key"]
    noise: Float[Array, "*chunks token"]
    log_rate: Float[Array, "*chunks token 1"]
    starts: Bool[Array, "*chunks token"] | None


class _Natural(eqx.Module):
    """Natural parameters at chunk starts, the prior's precision apart."""

    excess: Float[Array, "*chunks key key"]
    information: Float[Array, "*chunks value key"]


def forget_scan(
    stream: Stream, initial: Belief, prior: Belief, algorithm: Algorithm, length: int
) -> tuple[Belief, Reading]:
    """Belief after the last token, and every token's reading.

    Args:
        stream: without decay or drift, which leave no natural parameters to add up.
        initial: belief before the first token.
        prior: what is forgotten towards; mean 0.
        algorithm: how chunks follow each other.
        length: tokens per chunk.

    Raises:
        ValueError: the stream decays or drifts.
    """
    if stream.log_decay is not None or stream.drift is not None:
        raise ValueError(
            "`Forget` in chunks takes a memory that neither decays nor drifts; "
            'use algorithm="token".'
        )
    restored = jnp.linalg.inv(prior.covariance)
    precision = jnp.linalg.inv(initial.covariance)
    rate = jnp.ones_like(stream.noise) if stream.rate is None else stream.rate
    chunks = _Chunk(
        cut(stream.key, length),
        cut(stream.value, length),
        cut(stream.query, length),
        cut(stream.noise, length, 1.0),
        cut(jnp.log(rate)[:, None], length),
        None if stream.starts is None else cut(stream.starts, length),
    )

    def written(chunk: _Chunk):
        decay = within_chunk(chunk.log_rate, chunk.starts)
        weighted = to_end(chunk.key, decay) / chunk.noise[:, None]
        kept = jnp.broadcast_to(whole(decay, weighted), weighted.shape[1:])
        return kept, exact_product(weighted.T, chunk.key), exact_product(chunk.value.T, weighted)

    kept, excess, information = jax.vmap(written)(chunks)
    excess, excesses = chunk_states(precision - restored, kept, excess, algorithm)
    information, informations = chunk_states(
        exact_product(initial.mean, precision), kept, information, algorithm
    )

    @jax.checkpoint
    def read(moment):
        start, chunk = moment
        return _read(start, chunk, restored)

    mean, variance, evidence = jax.lax.map(
        read, (_Natural(excesses, informations), chunks), batch_size=_TOGETHER
    )
    covariance = jnp.linalg.inv(excess + restored)
    time = stream.length
    reading = Reading(join(mean, time), join(variance, time), join(evidence, time))
    return Belief(exact_product(information, covariance), covariance), reading


def _read(start: _Natural, chunk: _Chunk, restored: Float[Array, "key key"]):
    decay = within_chunk(chunk.log_rate, chunk.starts)
    length, width = chunk.key.shape
    earlier = jnp.tril(ratios(decay, chunk.key), -1) / chunk.noise
    seen = from_start(jnp.ones((length, 1), chunk.key.dtype), decay)
    outer = (chunk.key[:, :, None] * chunk.key[:, None, :]).reshape(length, -1)
    excess = seen * start.excess.ravel() + exact_product(earlier, outer)
    precision = excess.reshape(length, width, width) + restored
    sides = jnp.stack([chunk.key, chunk.query], axis=-1)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(precision), True), sides)
    of_key, of_query = solved[..., 0], solved[..., 1]

    def before(direction):
        carried = seen * exact_product(direction, start.information.T)
        within = earlier * exact_product(direction, chunk.key.T)
        return carried + exact_product(within, chunk.value)

    innovation_variance = jnp.sum(of_key * chunk.key, axis=-1) + chunk.noise
    innovation = chunk.value - before(of_key)
    tied = jnp.sum(of_query * chunk.key, axis=-1)
    mean = before(of_query) + (tied / innovation_variance)[:, None] * innovation
    variance = jnp.sum(of_query * chunk.query, axis=-1) - tied**2 / innovation_variance
    return mean, variance, log_density(innovation, innovation_variance)
