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

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from design_models.catalogue import recurrence

from . import links
from .entries import EntryMemory
from .memory import Memory, StreamMemory
from .mixer import SequenceMixer, Source
from .precision import MeanDtype
from .rules import Additive, Diagonal, Exact, Forget, Isotropic, Reset, Rule
from .scans import Algorithm
from .sources import GatedDecay, Link, PerHead, Projected, identity, step_bias

DRIFT_BIAS = -6.0
"""Drift starts near 0.0025 a step."""

_RULES: dict[str, Rule] = {
    "linear_attention": Additive(),
    "retnet": Additive(),
    "gla": Additive(),
    "mamba2": Additive(),
    "deltanet": Reset(1.0),
    "gated_deltanet": Reset(1.0),
    "kda": Reset(1.0),
    "deltaproduct": Reset(1.0),
    "mesanet": Forget(),
    "kalman_delta_isotropic": Isotropic(),
    "kalman_delta_diagonal": Diagonal(),
    "bayesian_static": Exact(),
    "bayesian_layer": Exact(),
}
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
    recurrence(name)
    key_width, value_width, groups = head_widths(d_model, heads, key_width, value_width, key_heads)
    rng_mixer, *rngs = jax.random.split(rng, 5)
    gates = _gates(name, d_model, heads, value_width, key_width, rngs[0])
    memory = _memory(name, value_width, key_width, gates, algorithm, dtype)
    key_link, query_link, value_link = _links(name)
    taps = None if name in _PLAIN else SHORT_CONVOLUTION
    shapes = memory.inputs

    def project(part: str, link: Link, rng: PRNGKeyArray, groups: int, taps: int | None) -> Source:
        return Projected(d_model, heads, shapes[part], link, taps=taps, groups=groups, rng=rng)

    sources = {
        "key": project("key", key_link, rngs[1], groups, taps),
        "query": project("query", query_link, rngs[2], groups, taps),
        "value": project("value", value_link, rngs[3], 1, None if name == "mesanet" else taps),
    }
    return SequenceMixer(
        memory,
        d_model,
        heads,
        sources | gates,
        name=name,
        gate=name not in _UNGATED,
        rng=rng_mixer,
    )


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
    if heads % (key_heads or heads):
        raise ValueError(f"`heads` is {heads}; it must be a multiple of `key_heads`, {key_heads}.")
    width = d_model // heads
    return key_width or width, value_width or width, heads // (key_heads or heads)


def _memory(name, value_width, key_width, gates, algorithm: Algorithm, dtype) -> Memory:
    if name in ("kalman_linear_attention", "longhorn"):
        rule = Exact() if name == "kalman_linear_attention" else Reset(1.0)
        return EntryMemory(value_width, key_width, rule)
    observations = 2 if name == "deltaproduct" else 1
    widths = tuple((gate, _shape_of(source)) for gate, source in sorted(gates.items()))
    return StreamMemory(
        value_width,
        key_width,
        _RULES[name],
        widths,
        observations,
        algorithm=algorithm,
        dtype=dtype,
    )


def _shape_of(source: Source) -> tuple[int, ...]:
    match source:
        case Projected():
            return source.shape
        case GatedDecay():
            return source.projection.shape
        case _:
            return source.parameter.shape[1:]


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

    def project(shape, link: Link, rng: PRNGKeyArray, bias: float | None = None, rank=None):
        return Projected(d_model, heads, shape, link, bias=bias, rank=rank, rng=rng)

    strength = project((), links.noise_of_strength, rngs[0])
    bounded = project((), links.bounded_noise, rngs[0])
    noise = project((), links.bounded_softplus, rngs[0])
    by_head = GatedDecay(d_model, heads, rng=rngs[1])
    by_key = GatedDecay(d_model, heads, (key_width,), rank=value_width, rng=rngs[1])
    drift = project((), links.drift, rngs[2], DRIFT_BIAS)
    match name:
        case "linear_attention":
            return {}
        case "retnet":
            decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads))))
            return {"log_decay": PerHead(decay, identity, learned=False)}
        case "gla":
            return {"log_decay": project((key_width,), links.log_forget, rngs[1], 0.0, 16)}
        case "mamba2":
            rate = jnp.log(jax.random.uniform(rngs[1], (heads,), minval=1.0, maxval=16.0))
            step = project((), links.softplus, rngs[0], 0.0)
            step = _with_bias(step, step_bias(rngs[2], (heads,)))
            return {"log_decay": PerHead(rate, links.negative_exp), "step": step}
        case "deltanet":
            return {"noise": strength}
        case "gated_deltanet":
            return {"noise": strength, "log_decay": by_head}
        case "kda":
            return {"noise": strength, "log_decay": by_key}
        case "deltaproduct":
            return {"noise": project((2,), links.noise_of_strength, rngs[0])}
        case "longhorn":
            return {"noise": project((value_width,), links.noise_of_weight, rngs[0])}
        case "mesanet":
            return {
                "noise": project((), links.noise_of_weight, rngs[0], 0.0),
                "rate": project((), links.sigmoid, rngs[1], 4.0),
            }
        case "kalman_linear_attention":
            entry = (heads, value_width, key_width)
            return {
                "noise": project((value_width,), links.bounded_softplus, rngs[0]),
                "log_decay": PerHead(step_bias(rngs[1], entry), links.log_decay),
                "drift": PerHead(jnp.full(entry, DRIFT_BIAS), links.drift),
            }
        case "kalman_delta_isotropic":
            return {"noise": noise, "log_decay": by_key, "drift": drift}
        case "kalman_delta_diagonal":
            per_key = project((key_width,), links.drift, rngs[2], DRIFT_BIAS)
            return {"noise": noise, "log_decay": by_key, "drift": per_key}
        case "bayesian_static":
            return {"noise": bounded}
        case _:
            return {"noise": bounded, "log_decay": by_head, "drift": drift}


def _with_bias(source: Projected, bias: Array) -> Projected:
    return eqx.tree_at(lambda source: source.bias, source, bias)
