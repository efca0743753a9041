"""The model that a checkpoint becomes, and back: where each weight lies in a `LanguageModel`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layers import Block, LanguageModel, SequenceMixer, links
from layers.mixer import Source
from layers.norm import RootMeanSquareNorm
from layers.published import gate_shapes, written_and_read
from layers.sources import GatedDecay, Link, PerHead, Projected, identity, unit
from layers.strength import StrengthMemory, doubled_sigmoid

from . import names
from .configuration import Configuration

Where = Callable[[Any], Any]


def _relu_unit(key: Array) -> Array:
    return unit(jax.nn.relu(key))


def _feature_unit(key: Array) -> Array:
    return unit(links.feature(key))


def _scaled_relu_unit(query: Array) -> Array:
    return links.scaled(_relu_unit(query))


def _scaled_feature_unit(query: Array) -> Array:
    return links.scaled(_feature_unit(query))


def _scaled_unit(query: Array) -> Array:
    return links.scaled(unit(query))


_KEY_LINKS: dict[str, tuple[Link, Link]] = {
    "silu": (links.silu_unit, links.scaled_silu_unit),
    "relu": (_relu_unit, _scaled_relu_unit),
    "elu": (_feature_unit, _scaled_feature_unit),
    "identity": (unit, _scaled_unit),
}
_GATE_LINKS: dict[str, Link] = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def empty_model(configuration: Configuration) -> LanguageModel:
    """The model with shapes in place of arrays, which takes no memory."""
    return eqx.filter_eval_shape(partial(initial_model, configuration), jax.random.key(0))


def initial_model(configuration: Configuration, rng: Any) -> LanguageModel:
    """The model with weights drawn from `rng`, float32."""
    own = configuration
    model = LanguageModel(
        own.vocabulary,
        own.d_model,
        own.depth,
        partial(_mixer, own),
        hidden=own.hidden,
        tied=own.tied,
        rng=rng,
    )

    def with_epsilon(node: Any) -> Any:
        if isinstance(node, RootMeanSquareNorm):
            return RootMeanSquareNorm(node.scale, own.epsilon)
        return node

    return jax.tree.map(
        with_epsilon, model, is_leaf=lambda node: isinstance(node, RootMeanSquareNorm)
    )


def _mixer(configuration: Configuration, rng: Any) -> SequenceMixer:
    own = configuration
    rng_mixer, rng_strength, rng_decay, rng_gate, *rngs = jax.random.split(rng, 7)
    key_link, query_link = _KEY_LINKS[own.key_activation]
    parts = {
        "key": ((own.key_width,), key_link, own.taps),
        "query": ((own.key_width,), query_link, own.taps),
        "value": ((own.value_width,), jax.nn.silu, own.taps),
    }
    groups = own.heads // own.key_heads
    sources = written_and_read(own.d_model, own.heads, groups, parts, rngs)
    sources["strength"] = _strength(own, rng_strength)
    gates: dict[str, Source] = {}
    if own.decays:
        gates["log_decay"] = GatedDecay(own.d_model, own.heads, rng=rng_decay)
    mixer = SequenceMixer(
        StrengthMemory(own.value_width, own.key_width, gate_shapes(gates)),
        own.d_model,
        own.heads,
        sources | gates,
        name=own.kind,
        gate=own.gate is not None,
        rng=rng_mixer,
    )
    if own.gate is None:
        return mixer
    width, link = (own.value_width,), _GATE_LINKS[own.gate]
    gate = Projected(own.d_model, own.heads, width, link, rng=rng_gate)
    return eqx.tree_at(lambda mixer: mixer.gate, mixer, gate)


def _strength(configuration: Configuration, rng: Any) -> Source:
    heads = configuration.heads
    if not configuration.strength:
        return PerHead(jnp.ones(heads), identity, learned=False)
    link = doubled_sigmoid if configuration.doubled else links.sigmoid
    return Projected(configuration.d_model, heads, (), link, rng=rng)


_IN_BLOCK: dict[str, Where] = {
    "attn_norm.weight": lambda block: block.mixer_norm.scale,
    "attn.q_proj.weight": lambda block: block.mixer.sources["query"].weight,
    "attn.k_proj.weight": lambda block: block.mixer.sources["key"].weight,
    "attn.v_proj.weight": lambda block: block.mixer.sources["value"].weight,
    "attn.q_conv1d.weight": lambda block: block.mixer.sources["query"].convolution.taps,
    "attn.k_conv1d.weight": lambda block: block.mixer.sources["key"].convolution.taps,
    "attn.v_conv1d.weight": lambda block: block.mixer.sources["value"].convolution.taps,
    "attn.b_proj.weight": lambda block: block.mixer.sources["strength"].weight,
    "attn.a_proj.weight": lambda block: block.mixer.sources["log_decay"].projection.weight,
    "attn.A_log": lambda block: block.mixer.sources["log_decay"].rate,
    "attn.dt_bias": lambda block: block.mixer.sources["log_decay"].bias,
    "attn.g_proj.weight": lambda block: block.mixer.gate.weight,
    "attn.o_norm.weight": lambda block: block.mixer.norm.scale,
    "attn.o_proj.weight": lambda block: block.mixer.out,
    "mlp_norm.weight": lambda block: block.feed_norm.scale,
    "mlp.gate_proj.weight": lambda block: block.feed.gate,
    "mlp.up_proj.weight": lambda block: block.feed.up,
    "mlp.down_proj.weight": lambda block: block.feed.down,
}


def _places(model: LanguageModel, configuration: Configuration) -> Iterator[tuple[str, Array]]:
    """Every weight of the format, by name, as it lies in the model."""
    for name in names.shapes(configuration):
        match name:
            case names.EMBEDDING:
                yield name, model.embedding
            case names.HEAD:
                assert model.head is not None
                yield name, model.head
            case names.FINAL_NORM:
                yield name, model.norm.scale
            case _:
                layer, rest = name.removeprefix("model.layers.").split(".", 1)
                yield name, _IN_BLOCK[rest](model.blocks[int(layer)])


def model_of(configuration: Configuration, tensors: Mapping[str, np.ndarray]) -> LanguageModel:
    """The model whose weights are `tensors`, in float32.

    Args:
        configuration: of the checkpoint.
        tensors: all of `names.shapes`, in these shapes; float32, or fewer bits.
    """
    empty = empty_model(configuration)
    weights = [
        jnp.asarray(_turned(name, tensors[name]).astype(np.float32))  # XLA would flush the tiniest
        for name in names.shapes(configuration)
    ]
    model = eqx.tree_at(
        lambda model: [weight for _, weight in _places(model, configuration)], empty, weights
    )
    if configuration.strength:
        return model
    ones = _strength(configuration, None)
    return eqx.tree_at(
        lambda model: [block.mixer.sources["strength"] for block in model.blocks],
        model,
        [ones] * configuration.depth,
    )


def tensors_of(model: LanguageModel, configuration: Configuration) -> dict[str, np.ndarray]:
    """The model's weights by the names of the format and in its shapes, float32."""
    return {
        name: np.ascontiguousarray(_turned_back(name, np.asarray(weight)))
        for name, weight in _places(model, configuration)
    }


def _turned(name: str, tensor: np.ndarray) -> np.ndarray:
    """As the model has it: matrices multiply from the right, taps come first."""
    if name.endswith("conv1d.weight"):
        return tensor[:, 0, :].T
    return tensor if name == names.EMBEDDING or tensor.ndim == 1 else tensor.T


def _turned_back(name: str, weight: np.ndarray) -> np.ndarray:
    if name.endswith("conv1d.weight"):
        return weight.T[:, None, :]
    return weight if name == names.EMBEDDING or weight.ndim == 1 else weight.T


def logits(
    model: LanguageModel, tokens: Int[Array, "row time"]
) -> Float[Array, "row time vocabulary"]:
    """Logits of the next token; the blocks, which are alike, are compiled once."""
    with jax.default_matmul_precision("highest"):
        x = model.embedding[tokens]
        for block in model.blocks:
            x = _run(block, x)
        return _scores(model, x)


@eqx.filter_jit
def _run(block: Block, x: Array) -> Array:
    return jax.vmap(lambda row: block(row)[0])(x)


@eqx.filter_jit
def _scores(model: LanguageModel, x: Array) -> Array:
    return model.logits(model.norm(x))
