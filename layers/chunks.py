"""Cutting a sequence into chunks, and where packed documents start."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .spans import BLOCK


def chunk_length(time: int, longest: int) -> int:
    """Return the chunk length for a sequence: `longest`, or less where the sequence is shorter."""
    return min(longest, -(-time // BLOCK) * BLOCK)


def split(sequence: Array, length: int, fill: float | bool) -> Array:
    """Cut (time, ...) into (chunk, length, ...), the last chunk completed with `fill`."""
    missing = -sequence.shape[0] % length
    widths = [(0, missing)] + [(0, 0)] * (sequence.ndim - 1)
    padded = jnp.pad(sequence, widths, constant_values=fill)
    return padded.reshape(-1, length, *sequence.shape[1:])


def join(chunks: Array, time: int) -> Array:
    """Undo `split`."""
    return chunks.reshape(-1, *chunks.shape[2:])[:time]


def document_starts(
    segment: Int[Array, " time"], mask: Bool[Array, " time"] | None
) -> Bool[Array, " time"]:
    """Mark real tokens whose segment differs from that of the real token before them."""
    time = segment.shape[0]
    if mask is None:
        changed = segment[1:] != segment[:-1]
        return jnp.concatenate([jnp.zeros(min(time, 1), bool), changed])
    last_real = jax.lax.cummax(jnp.where(mask, jnp.arange(time), -1))
    before = jnp.concatenate([jnp.full(min(time, 1), -1), last_real[:-1]])
    return mask & (before >= 0) & (segment != segment[before])


def map_grouped(function: Callable[[PyTree], PyTree], chunks: PyTree, group: int) -> PyTree:
    """Map over the leading axis, `group` entries at a time, to bound the memory."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    if count <= group:
        return jax.vmap(function)(chunks)
    return jax.lax.map(function, chunks, batch_size=group)
