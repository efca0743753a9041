r"""Design model B in chunks: linear attention with decay.

$$ M \leftarrow M\,\mathrm{diag}(a_t) + v_t k_t^\top,\quad y_t = M x_t $$

Nothing held is ever corrected: Y = X̃ M0ᵀ + Q V with Q_ts = Σ_j x_tj k_sj α_tj/α_sj (s ≤ t), and
M_C = M0 diag(α_C) + Vᵀ K̂ with keys decayed to the chunk's end.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .chunks import decayed_products, from_start, to_end, whole, within_chunk
from .covariance import Algorithm
from .precision import MeanDtype, mean_product
from .stream import Mean


class Superposition(eqx.Module):
    """What is added and read, chunk by chunk."""

    key: Float[Array, "*chunks token key"]
    value: Float[Array, "*chunks token value"]
    query: Float[Array, "*chunks token key"]
    log_decay: Float[Array, "*chunks token width"] | None
    starts: Bool[Array, "*chunks token"] | None


def additive_scan(
    initial: Mean, chunks: Superposition, algorithm: Algorithm, dtype: MeanDtype = "float32"
) -> tuple[Mean, Float[Array, "chunk token value"]]:
    """Mean after the last chunk, and every token's output, chunk by chunk.

    Args:
        initial: mean before the first token.
        chunks: with a leading chunk axis.
        algorithm: how chunks follow each other, as in `layers.covariance.covariance_scan`.
        dtype: of the operands of products that carry values.
    """

    def write(chunk: Superposition):
        decay = within_chunk(chunk.log_decay, chunk.starts)
        kept = jnp.broadcast_to(whole(decay, chunk.key), initial.shape[1:])
        return kept, mean_product(chunk.value.T, to_end(chunk.key, decay), dtype)

    def read(mean: Mean, chunk: Superposition):
        decay = within_chunk(chunk.log_decay, chunk.starts)
        within = decayed_products(chunk.query, chunk.key, decay)
        carried = mean_product(from_start(chunk.query, decay), mean.T, dtype)
        return carried + mean_product(within, chunk.value, dtype)

    kept, written = jax.vmap(write)(chunks)
    last, starts = chunk_states(initial, kept, written, algorithm)
    return last, jax.vmap(read)(starts, chunks)


def chunk_states(
    initial: Float[Array, "*state"],
    kept: Float[Array, "chunk key"],
    written: Float[Array, " chunk *state"],
    algorithm: Algorithm,
) -> tuple[Float[Array, "*state"], Float[Array, " chunk *state"]]:
    """The last state, and the state at each chunk's start, of S ← S diag(kept) + written."""
    if algorithm == "parallel":
        kept = jnp.broadcast_to(
            kept.reshape(len(kept), *(1,) * (written.ndim - 2), -1), written.shape
        )

        def combine(first, second):
            return first[0] * second[0], first[1] * second[0] + second[1]

        kept, written = jax.lax.associative_scan(combine, (kept, written))
        ends = initial * kept + written
        return ends[-1], jnp.concatenate([initial[None], ends[:-1]])

    def body(state, chunk):
        kept, written = chunk
        return state * kept + written, state

    return jax.lax.scan(body, initial, (kept, written))
