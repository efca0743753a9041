"""What restored layers do inside: their dials, gains and variances, early and late in a row."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from layers import LanguageModel
from layers.strength import filter_inputs
from recall.checkpoints.surgery import restoration_of, restorations
from recall.text.corpus import Rows

from .forward import Compute, Packed, packed, run_rows

_EDGE = 64
"""Tokens that "early" and "late" mean, after the first few."""


def inside(
    model: LanguageModel, rows: Rows, end: int, compute: Compute
) -> dict[str, dict[str, Any]]:
    """Of each restored layer, means for every head.

    `restoration` λ, `reset` σ², and over tokens `strength` β, `decay` a, `drift` q, `noise` r;
    `gain`, kᵀP⁻k/(kᵀP⁻k + r), and `variance`, kᵀPk after the write, along the token's own key: all
    over tokens, and of the row's first and last 64. A delta rule's gain is its strength.

    Args:
        model: with restored layers.
        rows: few, each one document for the most part.
        end: the token that ends documents.
        compute: dtype of the sequence.
    """
    found, dials = {}, restorations(model)
    batch = packed(jnp.asarray(rows), end)
    layers = tuple(dials)
    if not layers:
        return {}
    read = _read(model, batch, compute, layers)
    for layer in layers:
        mixer = model.blocks[layer].mixer
        assert restoration_of(mixer) is not None
        told = {name: np.asarray(part) for name, part in _of_tokens(mixer, read[layer]).items()}
        means = {name: part.mean(axis=(0, 1)) for name, part in told.items()}
        for name in ("gain", "variance"):
            means[f"{name}_early"] = told[name][:, :_EDGE].mean(axis=(0, 1))
            means[f"{name}_late"] = told[name][:, -_EDGE:].mean(axis=(0, 1))
        means["restoration"] = dials[layer]
        found[str(layer)] = {name: np.asarray(part).tolist() for name, part in means.items()}
    return found


@eqx.filter_jit
def _read(
    model: LanguageModel, batch: Packed, compute: Compute, layers: tuple[int, ...]
) -> dict[int, Array]:
    return run_rows(model, batch, compute, keep=layers).normed


@eqx.filter_jit
def _of_tokens(mixer: Any, read: Any) -> dict[str, Any]:
    """Each number for every (row, time, head): the memory is read along the key that it wrote."""

    def row(x):
        u = mixer.head_inputs(x)
        u["query"] = u["key"]
        run = jax.vmap(mixer.memory, in_axes=(1, 0), out_axes=(1, 0))
        prediction, _ = run(u, mixer.init_state().memories)
        given = filter_inputs(u)
        return {
            "strength": u["strength"],
            "decay": jnp.exp(u.get("log_decay", jnp.zeros_like(given["noise"]))),
            "drift": given["drift"],
            "reset": u["reset"],
            "noise": given["noise"],
            "variance": prediction.variance,
            # After a write of gain g with noise r, the variance along the key is g r.
            "gain": prediction.variance / given["noise"],
        }

    return jax.vmap(row)(read)
