"""Packed documents and padding: where documents start, and what stands in for what is not there."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .precision import cast


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


_FILLERS = {"noise": 1, "rate": 1}


def without_padding[Tokens: eqx.Module](tokens: Tokens, mask: Bool[Array, " time"]) -> Tokens:
    """Let padding write nothing and take no time: 0 in every field, 1 in a noise or a rate."""
    filled = {
        field.name: at_padding(getattr(tokens, field.name), mask, _FILLERS.get(field.name, 0))
        for field in fields(tokens)
        if field.name != "starts"
    }
    return replace(tokens, **filled)


def at_tokens(
    u: Mapping[str, Array], examples: Mapping[str, Array], mask: Bool[Array, " time"] | None
) -> Mapping[str, Array]:
    """A model's inputs in the dtype of states; at padding an example, where it has a density."""
    wide = cast(dict(u), jnp.result_type(float))
    if mask is None:
        return wide
    return {
        name: at_padding(array, mask, jnp.asarray(examples[name])[0].astype(array.dtype))
        for name, array in wide.items()
    }
