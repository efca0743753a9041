"""Packed documents and padding: where documents start, and what stands in for what is not there."""

from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def document_starts(
    segment_ids: Int[Array, " time"], mask: Bool[Array, " time"] | None = None
) -> Bool[Array, " time"]:
    """Tokens that start a document; the first document goes on from the state that it is given.

    Padding belongs to the document before it, or to the first, whatever its number: a document that
    begins with padding starts at its first token.
    """
    time = segment_ids.shape[0]
    if time == 0:
        return jnp.zeros(0, bool)
    if mask is not None:
        latest = jax.lax.cummax(jnp.where(mask, jnp.arange(time), jnp.argmax(mask)))
        segment_ids = segment_ids[latest]
    return jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]])


@overload
def at_padding(array: None, mask: Bool[Array, " time"], filler: Array | float) -> None: ...
@overload
def at_padding(array: Array, mask: Bool[Array, " time"], filler: Array | float) -> Array: ...
def at_padding(array, mask, filler):
    """`filler` at padding, `array` elsewhere; what is absent stays absent."""
    if array is None:
        return None
    return jnp.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, filler)
