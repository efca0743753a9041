"""The Bayesian Layer as a sequence mixer, with its restoration dial."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from . import links
from .memory import StreamMemory
from .mixer import SequenceMixer, Source
from .precision import MeanDtype
from .published import (
    DRIFT_BIAS,
    SHORT_CONVOLUTION,
    gate_shapes,
    head_widths,
    written_and_read,
)
from .rules import Exact
from .scans import Algorithm
from .sources import GatedDecay, PerHead, Projected

Rate = Literal["none", "scalar", "key"]


def unit_interval(number: Array) -> Array:
    """Clipped to [0, 1], with the derivative of the identity so that it can come back."""
    return number + jax.lax.stop_gradient(jnp.clip(number, 0, 1) - number)


def BayesianLayer(  # it makes a SequenceMixer, and is used as a class is
    d_model: int,
    heads: int,
    *,
    key_width: int | None = None,
    value_width: int | None = None,
    key_heads: int | None = None,
    decay: Rate = "scalar",
    drift: Rate = "scalar",
    restoration: float | None = None,
    learn_restoration: bool = False,
    algorithm: Algorithm = "chunked",
    dtype: MeanDtype = "float32",
    rng: PRNGKeyArray,
) -> SequenceMixer:
    r"""A sequence mixer whose every head is the exact filter of design model A.

    $$ S_t = S_{t-1}\mathrm{diag}(a_t) + N(0, q_t),\quad v_t = S_t k_t + N(0, r_t),\quad S_0 \sim
       N(0, 1) $$

    Keys and queries are short-convolved, passed through SiLU and normalised; the gates are Gated
    DeltaNet's: r = (1 − β)/β with β = σ(W x), kept above 1e-4, log a = −e^A softplus(W x + b).

    Args:
        d_model: width of the sequence.
        heads: memories side by side.
        key_width: of each head; d_model / heads where left out.
        value_width: of each head; d_model / heads where left out.
        key_heads: heads that have keys and queries of their own, shared by groups of value heads;
            all where left out.
        decay: of the memory: none, one number per token or one per key.
        drift: variance added per token: likewise.
        restoration: λ of every head, from 0 (the covariance is reset before each write: with
            `drift="none"` a Gated DeltaNet) to 1; None for the exact filter without a dial.
        learn_restoration: whether training moves λ, within [0, 1].
        algorithm: how sequences are computed; the numbers are the same.
        dtype: of the operands of products that carry values.
        rng: for the initial parameters.

    Returns:
        A layer: `outputs, prediction = layer(x)`, x (time, d_model); `layer.init_state()` and
        `layer.step(x_t, state)` decode.

    Raises:
        ValueError: an argument makes no sense.
    """
    for name, rate in (("decay", decay), ("drift", drift)):
        if rate not in ("none", "scalar", "key"):
            raise ValueError(f'`{name}` is {rate!r}; it must be "none", "scalar" or "key".')
    if restoration is not None and not 0 <= restoration <= 1:
        raise ValueError(f"`restoration` is {restoration}; it must lie between 0 and 1.")
    if learn_restoration and restoration is None:
        raise ValueError("`learn_restoration` needs a `restoration` to start from, 0 to 1.")
    key_width, value_width, groups = head_widths(d_model, heads, key_width, value_width, key_heads)
    shapes: dict[Rate, tuple[int, ...]] = {"scalar": (), "key": (key_width,)}
    rng_mixer, *rngs = jax.random.split(rng, 7)
    parts = {
        "key": ((key_width,), links.silu_unit, SHORT_CONVOLUTION),
        "query": ((key_width,), links.scaled_silu_unit, SHORT_CONVOLUTION),
        "value": ((value_width,), jax.nn.silu, SHORT_CONVOLUTION),
    }
    sources = written_and_read(d_model, heads, groups, parts, rngs[:3])
    gates: dict[str, Source] = {
        "noise": Projected(d_model, heads, (), links.bounded_noise, rng=rngs[3])
    }
    if decay != "none":
        rank = None if decay == "scalar" else value_width
        gates["log_decay"] = GatedDecay(d_model, heads, shapes[decay], rank=rank, rng=rngs[4])
    if drift != "none":
        gates["drift"] = Projected(
            d_model, heads, shapes[drift], links.drift, bias=DRIFT_BIAS, rng=rngs[5]
        )
    if restoration is not None:
        dial = jnp.full((heads,), restoration, float)
        gates["restoration"] = PerHead(dial, unit_interval, learned=learn_restoration)
    memory = StreamMemory(
        value_width,
        key_width,
        Exact(),
        gate_shapes(gates),
        algorithm=algorithm,
        dtype=dtype,
    )
    return SequenceMixer(
        memory, d_model, heads, sources | gates, name="BayesianLayer", rng=rng_mixer
    )
