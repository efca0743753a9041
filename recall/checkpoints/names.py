"""The format: every weight's name and shape, as flash-linear-attention's models have them.

Matrices are (out, in), short convolutions (channel, 1, tap) with the last tap newest.
"""

from .configuration import Configuration

HEAD = "lm_head.weight"
EMBEDDING = "model.embeddings.weight"
FINAL_NORM = "model.norm.weight"


def block_prefix(layer: int) -> str:
    """What the names of a block's weights begin with."""
    return f"model.layers.{layer}."


def shapes(configuration: Configuration) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that the model has; a tied head is none of its own."""
    own = configuration
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (own.vocabulary, own.d_model)}
    for layer in range(own.depth):
        found |= {block_prefix(layer) + name: shape for name, shape in block_shapes(own).items()}
    found[FINAL_NORM] = (own.d_model,)
    if not own.tied:
        found[HEAD] = (own.vocabulary, own.d_model)
    return found


def block_shapes(configuration: Configuration) -> dict[str, tuple[int, ...]]:
    """Name, without `block_prefix`, and shape of every weight of a block."""
    own, d_model = configuration, configuration.d_model
    keys, values = own.key_heads * own.key_width, own.heads * own.value_width
    found: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d_model,)}
    for letter, channels in (("q", keys), ("k", keys), ("v", values)):
        found[f"attn.{letter}_proj.weight"] = (channels, d_model)
        if own.taps is not None:
            found[f"attn.{letter}_conv1d.weight"] = (channels, 1, own.taps)
    if own.strength:
        found["attn.b_proj.weight"] = (own.heads, d_model)
    if own.decays:
        found["attn.a_proj.weight"] = (own.heads, d_model)
        found["attn.A_log"] = found["attn.dt_bias"] = (own.heads,)
    if own.gate is not None:
        found["attn.g_proj.weight"] = (values, d_model)
    return found | {
        "attn.o_norm.weight": (own.value_width,),
        "attn.o_proj.weight": (d_model, values),
        "mlp_norm.weight": (d_model,),
        "mlp.gate_proj.weight": (own.hidden, d_model),
        "mlp.up_proj.weight": (own.hidden, d_model),
        "mlp.down_proj.weight": (d_model, own.hidden),
    }
