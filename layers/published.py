r"""The catalogue's recurrences as sequence mixers, with their published gates and initialisations.

Each is a memory and where its inputs come from:

| recurrence | decay | write |
|---|---|---|
| linear attention | none | keys φ(k) = elu(k) + 1 |
| RetNet | 1 − 2^(−5−h) in head h | |
| GLA | σ(W₂W₁x + b)^(1/16) per key | |
| Mamba-2 | exp(−Δ e^A), Δ = softplus(W x + b) | Δ v |
| DeltaNet, DeltaProduct | none | β = σ(W x) |
| Gated DeltaNet, KDA | exp(−e^A softplus(W x + b)), per head, per key | β = σ(W x) |
| Longhorn | none | β = σ(W x) per value |
| MesaNet | forgets at σ(W x + b) | β = σ(W x) |
| Kalman Linear Attention | one of each entry's own | r = softplus(W x) per value |
| Kalman Delta Networks | as KDA, drift softplus(W x + b) | r = softplus(W x) |
| Bayesian Layer | as Gated DeltaNet, drift softplus(W x + b) | r = (1 − β)/β |

Left out, as outside of the recurrence: RetNet's rotations, Mamba-2's skip connection D, Longhorn's
and Kalman Linear Attention's surrounding blocks. A delta rule's β with keys of length 1 is the gain
of a reset covariance σ² at noise r = σ²(1 − β)/β.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from design_models.catalogue import ENTRIES, INCREMENTS, recurrence

from . import links
from .entries import EntryMemory
from .memory import Memory, StreamMemory
from .mixer import SequenceMixer, Source
from .precision import MeanDtype
from .rules import Additive, Exact, Reset
from .scans import Algorithm
from .sources import GatedDecay, Link, PerHead, Projected, identity, step_bias

DRIFT_BIAS = -6.0
"""Drift starts near 0.0025 a step."""

SHORT_CONVOLUTION = 4
_PLAIN = ("linear_attention", "retnet", "gla", "kalman_linear_attention")
_UNGATED = ("linear_attention", "deltanet", "mesanet")


def published_mixer(
    name: str,
    d_model: int,
    heads: int,
    *,
    key_width: int | None = None,
    value_width: int | None = None,
    key_heads: int | None = None,
    algorithm: Algorithm = "chunked",
    dtype: MeanDtype = "float32",
    rng: PRNGKeyArray,
) -> SequenceMixer:
    """A recurrence of the catalogue as a sequence mixer.

    Args:
        name: the catalogue's name.
        d_model: width of the sequence.
        heads: memories side by side.
        key_width: of each head; d_model / heads where left out.
        value_width: of each head; d_model / heads where left out.
        key_heads: heads that have keys and queries of their own, shared by groups of value heads;
            all where left out.
        algorithm: how sequences are computed; the numbers are the same.
        dtype: of the operands of products that carry values.
        rng: for the initial parameters.

    Raises:
        ModelError: the catalogue has no such name.
        ValueError: widths or heads do not divide.
    """
    recurrence(name)  # or the error that names the closest
    key_width, value_width, groups = head_widths(d_model, heads, key_width, value_width, key_heads)
    rng_mixer, *rngs = jax.random.split(rng, 5)
    gates = _gates(name, d_model, heads, value_width, key_width, rngs[0])
    memory = _memory(name, value_width, key_width, gates, algorithm, dtype)
    taps = None if name in _PLAIN else SHORT_CONVOLUTION
    key_link, query_link, value_link = _links(name)
    parts = {
        "key": (memory.inputs["key"], key_link, taps),
        "query": (memory.inputs["query"], query_link, taps),
        "value": (memory.inputs["value"], value_link, None if name == "mesanet" else taps),
    }
    sources = written_and_read(d_model, heads, groups, parts, rngs[1:])
    return SequenceMixer(
        memory,
        d_model,
        heads,
        sources | gates,
        name=name,
        gate=name not in _UNGATED,
        rng=rng_mixer,
    )


def written_and_read(
    d_model: int,
    heads: int,
    groups: int,
    parts: Mapping[str, tuple[tuple[int, ...], Link, int | None]],
    rngs: Sequence[PRNGKeyArray],
) -> dict[str, Source]:
    """Projections of keys, queries and values.

    Args:
        d_model: width of the sequence.
        heads: memories side by side.
        groups: heads that share a key and a query.
        parts: shape, link and taps of each.
        rngs: for the initial parameters of each.
    """
    return {
        part: Projected(
            d_model,
            heads,
            shape,
            link,
            taps=taps,
            groups=1 if part == "value" else groups,
            rng=rng,
        )
        for (part, (shape, link, taps)), rng in zip(parts.items(), rngs, strict=True)
    }


def head_widths(
    d_model: int,
    heads: int,
    key_width: int | None,
    value_width: int | None,
    key_heads: int | None,
) -> tuple[int, int, int]:
    """Key width, value width, and how many heads share each key.

    Raises:
        ValueError: widths or heads do not divide.
    """
    if (key_width is None or value_width is None) and d_model % heads:
        raise ValueError(
            f"`d_model` is {d_model}, no multiple of `heads`, {heads}; give `key_width` and "
            "`value_width`."
        )
    width = d_model // heads
    return key_width or width, value_width or width, sharing(heads, key_heads)


def sharing(heads: int, key_heads: int | None) -> int:
    """How many heads share each key.

    Raises:
        ValueError: `key_heads` does not divide `heads`.
    """
    if heads % (key_heads or heads):
        raise ValueError(f"`heads` is {heads}; it must be a multiple of `key_heads`, {key_heads}.")
    return heads // (key_heads or heads)


def _memory(name, value_width, key_width, gates, algorithm: Algorithm, dtype) -> Memory:
    entry = recurrence(name)
    if entry.assumption == ENTRIES:
        assert isinstance(entry.policy, Exact | Reset)
        return EntryMemory(value_width, key_width, entry.policy)
    return StreamMemory(
        value_width,
        key_width,
        Additive() if entry.assumption == INCREMENTS else entry.policy,
        gate_shapes(gates),
        observations=2 if name == "deltaproduct" else 1,
        algorithm=algorithm,
        dtype=dtype,
    )


def gate_shapes(gates: Mapping[str, Source]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The inputs of a `StreamMemory` that gates give, with their shapes at one token."""
    return tuple((name, source.shape) for name, source in sorted(gates.items()))


def _links(name: str) -> tuple[Link, Link, Link]:
    """Links of key, query and value."""
    match name:
        case "linear_attention":
            return links.feature, links.feature, identity
        case "retnet" | "gla" | "kalman_linear_attention":
            return identity, links.scaled, identity
        case "mamba2" | "longhorn":
            return jax.nn.silu, jax.nn.silu, jax.nn.silu
        case "mesanet":
            return links.silu_unit, links.silu_unit, identity
        case _:
            return links.silu_unit, links.scaled_silu_unit, jax.nn.silu


def _gates(
    name: str, d_model: int, heads: int, value_width: int, key_width: int, rng: PRNGKeyArray
) -> dict[str, Source]:
    """Where everything but keys, queries and values comes from."""
    rngs = jax.random.split(rng, 3)

    def project(shape, link: Link, rng: PRNGKeyArray, bias=None, rank=None):
        return Projected(d_model, heads, shape, link, bias=bias, rank=rank, rng=rng)

    def noise(link: Link, shape: tuple[int, ...] = (), bias: float | None = None):
        return project(shape, link, rngs[0], bias)

    def decay(shape: tuple[int, ...] = ()):
        rank = value_width if shape else None
        return GatedDecay(d_model, heads, shape, rank=rank, rng=rngs[1])

    def drift(shape: tuple[int, ...] = ()):
        return project(shape, links.drift, rngs[2], DRIFT_BIAS)

    match name:
        case "linear_attention":
            return {}
        case "retnet":
            log_decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads))))
            return {"log_decay": PerHead(log_decay, identity, learned=False)}
        case "gla":
            return {"log_decay": project((key_width,), links.log_forget, rngs[1], 0.0, 16)}
        case "mamba2":
            rate = jnp.log(jax.random.uniform(rngs[1], (heads,), minval=1.0, maxval=16.0))
            step = project((), links.softplus, rngs[0], step_bias(rngs[2], (heads,)))
            return {"log_decay": PerHead(rate, links.negative_exp), "step": step}
        case "deltanet":
            return {"noise": noise(links.noise_of_strength)}
        case "gated_deltanet":
            return {"noise": noise(links.noise_of_strength), "log_decay": decay()}
        case "kda":
            return {"noise": noise(links.noise_of_strength), "log_decay": decay((key_width,))}
        case "deltaproduct":
            return {"noise": noise(links.noise_of_strength, (2,))}
        case "longhorn":
            return {"noise": noise(links.noise_of_weight, (value_width,))}
        case "mesanet":
            return {
                "noise": noise(links.noise_of_weight, bias=0.0),
                "rate": project((), links.sigmoid, rngs[1], 4.0),
            }
        case "kalman_linear_attention":
            entry = (heads, value_width, key_width)
            return {
                "noise": noise(links.bounded_softplus, (value_width,)),
                "log_decay": PerHead(step_bias(rngs[1], entry), links.log_decay),
                "drift": PerHead(jnp.full(entry, DRIFT_BIAS, float), links.drift),
            }
        case "kalman_delta_isotropic" | "kalman_delta_diagonal":
            return {
                "noise": noise(links.bounded_softplus),
                "log_decay": decay((key_width,)),
                "drift": drift((key_width,) if name == "kalman_delta_diagonal" else ()),
            }
        case "bayesian_static":
            return {"noise": noise(links.bounded_noise)}
        case _:
            return {"noise": noise(links.bounded_noise), "log_decay": decay(), "drift": drift()}
