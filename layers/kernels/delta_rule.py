"""Delta rules by the kernels of jax-linear-attention, where that is installed, in bfloat16.

They give means alone. Read-outs are those of `layers.delta` to bfloat16's digits (within 1e-2).
"""

from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.rules import Reset, Rule
from layers.stream import Mean, Stream

from .head import over_rows

WIDTHS = (64, 128)


@cache
def installed() -> bool:
    return find_spec("jla") is not None


def delta_refusal(stream: Stream, rule: Rule, algorithm: str) -> str | None:
    """Why jax-linear-attention's kernels do not take this filter; None where they do."""
    if not isinstance(rule, Reset):
        return f"`rule` is {rule}, and delta rules are Reset"
    if algorithm != "chunked":
        return f'`algorithm` is "{algorithm}", and kernels take "chunked"'
    vectors = stream.key, stream.value, stream.query
    if any(part.dtype != jnp.bfloat16 for part in vectors):
        return "keys, values and queries are not all bfloat16"
    if stream.observations != 1 or stream.length == 0:
        return "kernels take one write a token, of one token or more"
    if stream.log_decay is not None and stream.log_decay.ndim > 1:
        return "`log_decay` is one number per key, and kernels take one a token"
    if any(part.shape[-1] not in WIDTHS for part in vectors):
        return f"keys and values must be {' or '.join(map(str, WIDTHS))} wide"
    if not installed():
        return "jax-linear-attention is not installed"
    return None


class DeltaHead(NamedTuple):
    """What one head writes and reads; `document` counts the starts of documents."""

    key: Float[Array, "time key"]
    value: Float[Array, "time value"]
    query: Float[Array, "time key"]
    strength: Float[Array, " time"]
    log_decay: Float[Array, " time"]
    mean: Mean
    document: Int[Array, " time"]


def delta_rule(
    stream: Stream, initial: Mean, variance: float
) -> tuple[Float[Array, "time value"], Mean]:
    """Read-outs, and the mean after the last token.

    Args:
        stream: that `delta_refusal` does not refuse.
        initial: mean before the first token.
        variance: σ² of the reset.
    """
    squares = jnp.sum(jnp.square(stream.key.astype(jnp.float32)), axis=-1)
    strength = variance / (variance * squares + stream.noise.astype(jnp.float32))
    decay = stream.log_decay
    documents = stream.starts is not None
    document = jnp.zeros(stream.length, jnp.int32)
    if stream.starts is not None:
        document = jnp.cumsum(stream.starts.astype(jnp.int32))
    return _head(
        DeltaHead(
            stream.key,
            stream.value,
            stream.query,
            strength,
            jnp.zeros_like(strength) if decay is None else decay.astype(jnp.float32),
            initial.astype(jnp.float32),
            document,
        ),
        documents,
    )


def _rows(documents: bool, number: int, *head: Array):
    """Of many heads, as one batch whose rows have one head each."""
    key, value, query, strength, log_decay, mean, document = head
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"segment_ids": document} if documents else {}
    outputs, last = linear_attention(
        "gated_deltanet",
        *(part[:, :, None] for part in (query, key, value)),
        g=log_decay[..., None],
        beta=strength[..., None],
        scale=1.0,
        initial_state=mean.mT[:, None],
        output_final_state=True,
        **options,
    )
    return outputs[:, :, 0].astype(jnp.float32), last[:, 0].mT.astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _head(head: DeltaHead, documents: bool):
    return _run(head, documents)


# A program of its own, so that layers that are alike share their kernels: each is lowered once.
@partial(jax.jit, static_argnums=1)
def _run(head: DeltaHead, documents: bool):
    return over_rows(partial(_rows, documents))(*head)


def _forward(head: DeltaHead, documents: bool):
    return _run(head, documents), head


@partial(jax.jit, static_argnums=0)
def _backward(documents: bool, head: DeltaHead, cotangents):
    """Of all heads at once; the forward pass is made again, which is cheap."""
    *numbers, document = head

    def rows(count, of_outputs, of_last, document, *numbers):
        def run(*numbers):
            return _rows(documents, count, *numbers, document)

        return jax.vjp(run, *numbers)[1]((of_outputs, of_last))

    found: Any = over_rows(rows)(*cotangents, document, *numbers)
    given: Any = dict(zip(DeltaHead._fields, (*found, None), strict=True))
    return (DeltaHead(**given),)


_head.defvjp(_forward, _backward)
