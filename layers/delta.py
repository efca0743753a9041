r"""Means under given gains, in chunks: the generalised delta rule.

$$ M \leftarrow M\,\mathrm{diag}(a_t),\quad e_t = v_t - M k_t,\quad M \leftarrow M + e_t g_t^\top,
   \quad y_t = M x_t $$

With g = βk it is the delta rule; with the Kalman gains of `layers.covariance` the exact filter.
Within a chunk that starts from M0, A_ts = Σ_j k_tj g_sj α_tj/α_sj (s < t) ties the innovations,

$$ (I + A)\, E = V - \tilde K M_0^\top,\quad Y = \tilde X M_0^\top + Q E,\quad
   M_C = M_0 \mathrm{diag}(\alpha_C) + E^\top \hat G, $$

with Q the same products with x in place of k (s ≤ t), and Ĝ the gains decayed to the chunk's end
(the UT form of Yang et al., 2024, arXiv 2406.06484). T = (I + A)⁻¹ and all that does not depend on
M0 is found for all chunks at once; the pass over chunks is one affine map of M0 each, so its
gradient is the closed-loop recursion $\\bar M_0 = \\bar M_C \\Psi^\\top$ + own, and it keeps one
state a chunk.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .chunks import decayed_products, from_start, to_end, whole, within_chunk
from .covariance import Algorithm
from .precision import MeanDtype, exact_product, mean_product
from .stream import Mean
from .triangular import triangular_inverse


class Writes(eqx.Module):
    """What is written and read, chunk by chunk, with the gain of each write."""

    key: Float[Array, "*chunks token key"]
    gain: Float[Array, "*chunks token key"]
    value: Float[Array, "*chunks token value"]
    query: Float[Array, "*chunks token key"]
    log_decay: Float[Array, "*chunks token width"] | None
    starts: Bool[Array, "*chunks token"] | None


class _Chunk(eqx.Module):
    """What a chunk does to the mean that enters it: innovations are `value − key @ mean.T`."""

    value: Float[Array, "*chunks token value"]  # T V
    key: Float[Array, "*chunks token key"]  # T K̃
    end: Float[Array, "*chunks token key"]  # Ĝ
    kept: Float[Array, "*chunks width"]  # α_C


def _prepare(writes: Writes, dtype: MeanDtype) -> _Chunk:
    decay = within_chunk(writes.log_decay, writes.starts)
    tied = jnp.tril(decayed_products(writes.key, writes.gain, decay), -1)
    inverse = triangular_inverse(tied + jnp.eye(len(tied), dtype=tied.dtype))
    return _Chunk(
        mean_product(inverse, writes.value, dtype),
        exact_product(inverse, from_start(writes.key, decay)),
        to_end(writes.gain, decay),
        whole(decay, writes.gain),
    )


def _innovations(mean: Mean, chunk: _Chunk, dtype: MeanDtype) -> Float[Array, "token value"]:
    return chunk.value - mean_product(chunk.key, mean.T, dtype)


def _advance(mean: Mean, chunk: _Chunk, dtype: MeanDtype) -> Mean:
    innovations = _innovations(mean, chunk, dtype)
    return mean * chunk.kept + mean_product(innovations.T, chunk.end, dtype)


def _read(
    mean: Mean, chunk: _Chunk, writes: Writes, dtype: MeanDtype
) -> tuple[Float[Array, "token value"], Float[Array, "token value"]]:
    decay = within_chunk(writes.log_decay, writes.starts)
    innovations = _innovations(mean, chunk, dtype)
    within = decayed_products(writes.query, writes.gain, decay)
    outputs = mean_product(from_start(writes.query, decay), mean.T, dtype) + mean_product(
        within, innovations, dtype
    )
    return outputs, innovations


def delta_scan(
    initial: Mean, writes: Writes, algorithm: Algorithm, dtype: MeanDtype = "float32"
) -> tuple[Mean, Float[Array, "chunk token value"], Float[Array, "chunk token value"]]:
    """Mean after the last chunk; every token's output and innovation, chunk by chunk.

    Args:
        initial: mean before the first token.
        writes: with a leading chunk axis.
        algorithm: how chunks follow each other, as in `layers.covariance.covariance_scan`.
        dtype: of the operands of products that carry values.
    """
    chunks = jax.vmap(lambda writes: _prepare(writes, dtype))(writes)
    if algorithm == "parallel":
        starts, last = _starts_in_parallel(initial, chunks)
    else:

        def body(mean, chunk):
            return _advance(mean, chunk, dtype), mean

        last, starts = jax.lax.scan(body, initial, chunks)
    read = jax.vmap(lambda mean, chunk, writes: _read(mean, chunk, writes, dtype))
    outputs, innovations = read(starts, chunks, writes)
    return last, outputs, innovations


def _starts_in_parallel(initial: Mean, chunks: _Chunk) -> tuple[Array, Mean]:
    width = initial.shape[-1]

    def affine(chunk: _Chunk):
        kept = jnp.diag(jnp.broadcast_to(chunk.kept, (width,)))
        closed = kept - exact_product(chunk.key.T, chunk.end)
        return closed, exact_product(chunk.value.T, chunk.end)

    def combine(first, second):
        closed = exact_product(first[0], second[0])
        return closed, exact_product(first[1], second[0]) + second[1]

    closed, written = jax.lax.associative_scan(combine, jax.vmap(affine)(chunks))
    ends = exact_product(initial, closed) + written
    return jnp.concatenate([initial[None], ends[:-1]]), ends[-1]
