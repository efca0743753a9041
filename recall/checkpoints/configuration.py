"""What a checkpoint's config.json says of the model, in flash-linear-attention's words."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError

_SHARED = {
    "hidden_size": 2048,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "conv_size": 4,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "output_gate_activation": "swish",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gated_deltanet": _SHARED
    | {
        "num_hidden_layers": 21,
        "num_heads": 6,
        "num_v_heads": None,
        "head_dim": 256,
        "expand_v": 2.0,
        "use_gate": True,
    },
    "delta_net": _SHARED
    | {
        "num_hidden_layers": 24,
        "num_heads": 16,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_gate": False,
        "use_beta": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
    },
}
"""What a configuration that leaves a setting out means by it."""

_ABSENT = ("attn", "attnres_block_size", "quantization_config")
"""Settings of parts that the model does not have."""

_GATE_ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Configuration:
    """Sizes and switches of a Gated DeltaNet or a DeltaNet.

    Args:
        kind: "gated_deltanet" or "delta_net".
        vocabulary: number of tokens.
        d_model: width of the sequence.
        depth: number of blocks.
        hidden: width of the feed-forward layers.
        heads: memories side by side.
        key_heads: heads that have keys and queries of their own, shared by groups of `heads`.
        key_width: of each head.
        value_width: of each head.
        taps: of short convolutions; None without.
        gate: activation of the output gate, "silu" or "sigmoid"; None without.
        strength: whether β is projected from the sequence; it is 1 otherwise.
        doubled: whether β goes up to 2 (`allow_neg_eigval`).
        key_activation: "silu", "relu", "elu" (plus 1) or "identity", before keys are normalised.
        epsilon: of every norm.
        tied: whether the head is the embedding.
    """

    kind: str
    vocabulary: int
    d_model: int
    depth: int
    hidden: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    taps: int | None
    gate: str | None
    strength: bool
    doubled: bool
    key_activation: str
    epsilon: float
    tied: bool

    @property
    def decays(self) -> bool:
        return self.kind == "gated_deltanet"


def read_configuration(path: Path) -> Configuration:
    """Read config.json.

    Raises:
        ModelError: it cannot be read, or describes a model that is none of ours.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; a checkpoint holds a config.json.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return configuration_of(settings)


def configuration_of(settings: Mapping[str, Any]) -> Configuration:
    """What the settings of a config.json mean.

    Raises:
        ModelError: they describe a model that is none of ours, or make no sense.
    """
    kind = settings.get("model_type")
    if kind not in _DEFAULTS:
        raise ModelError(f"`model_type` is {kind!r}; it must be {' or '.join(_DEFAULTS)}.")
    for name in _ABSENT:
        if settings.get(name) is not None:
            raise ModelError(f"`{name}` is {settings[name]!r}; only null can be converted.")
    said = _DEFAULTS[kind] | {name: settings[name] for name in _DEFAULTS[kind] if name in settings}
    for name in ("use_short_conv", "use_gate", "use_beta", "allow_neg_eigval"):
        _one_of(said, name, (True, False))
    _one_of(said, "tie_word_embeddings", (True, False))
    _one_of(said, "hidden_act", ("swish", "silu"))
    _one_of(said, "qk_norm", ("l2",))
    _one_of(said, "qk_activation", ("silu", "relu", "elu", "identity"))
    _one_of(said, "output_gate_activation", tuple(_GATE_ACTIVATIONS))
    if kind == "delta_net":  # its model does not pass these on to its layers
        _one_of(said, "allow_neg_eigval", (False,))
        _one_of(said, "output_gate_activation", ("swish", "silu"))
    if not isinstance(said["norm_eps"], float | int) or not said["norm_eps"] > 0:
        raise ModelError(f"`norm_eps` is {said['norm_eps']!r}; it must be a number above 0.")
    heads, key_heads, key_width, value_width = _head_layout(kind, said)
    return Configuration(
        kind,
        vocabulary=_count(said, "vocab_size"),
        d_model=_count(said, "hidden_size"),
        depth=_count(said, "num_hidden_layers"),
        hidden=_hidden(said),
        heads=heads,
        key_heads=key_heads,
        key_width=key_width,
        value_width=value_width,
        taps=_count(said, "conv_size") if said["use_short_conv"] else None,
        gate=_GATE_ACTIVATIONS[said["output_gate_activation"]] if said["use_gate"] else None,
        strength=said.get("use_beta", True),
        doubled=said["allow_neg_eigval"],
        key_activation=said.get("qk_activation", "silu"),
        epsilon=float(said["norm_eps"]),
        tied=said["tie_word_embeddings"],
    )


def _head_layout(kind: str, said: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Heads, key heads, and the widths of a head's keys and values."""
    key_heads = _count(said, "num_heads")
    if kind == "delta_net":
        d_model = _count(said, "hidden_size")
        widths = []
        for name in ("expand_k", "expand_v"):
            channels = int(d_model * _ratio(said, name))
            if channels < 1 or channels % key_heads:
                raise ModelError(
                    f"`{name}` makes {channels} channels, no multiple of `num_heads`, {key_heads}."
                )
            widths.append(channels // key_heads)
        return key_heads, key_heads, widths[0], widths[1]
    heads = key_heads if said["num_v_heads"] is None else _count(said, "num_v_heads")
    if heads % key_heads:
        raise ModelError(
            f"`num_v_heads` is {heads}; it must be a multiple of `num_heads`, {key_heads}."
        )
    key_width = _count(said, "head_dim")
    value_width = key_width * _ratio(said, "expand_v")
    if int(value_width) < 1 or not math.isclose(value_width, int(value_width), rel_tol=1e-5):
        raise ModelError(
            f"`expand_v` is {said['expand_v']}; times `head_dim`, {key_width}, it must be whole."
        )
    return heads, key_heads, key_width, int(value_width)


def _hidden(said: Mapping[str, Any]) -> int:
    if said["intermediate_size"] is not None:
        return _count(said, "intermediate_size")
    ratio = 4.0 if said["hidden_ratio"] is None else _ratio(said, "hidden_ratio")
    return 256 * math.ceil(int(_count(said, "hidden_size") * ratio * 2 / 3) / 256)


def _one_of(said: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if name in said and said[name] not in allowed:
        words = " or ".join(json.dumps(value) for value in allowed)
        raise ModelError(f"`{name}` is {said[name]!r}; only {words} can be converted.")


def _count(said: Mapping[str, Any], name: str) -> int:
    if not isinstance(said[name], int) or isinstance(said[name], bool) or said[name] < 1:
        raise ModelError(f"`{name}` is {said[name]!r}; it must be a whole number from 1.")
    return said[name]


def _ratio(said: Mapping[str, Any], name: str) -> float:
    if not isinstance(said[name], int | float) or not 0 < said[name] < math.inf:
        raise ModelError(f"`{name}` is {said[name]!r}; it must be a number above 0.")
    return float(said[name])
