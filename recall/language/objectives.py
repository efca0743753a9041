"""What training makes small: loss on text, distance to a teacher's layers, or to its answers."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt16

from layers import LanguageModel
from recall.checkpoints.surgery import dials, with_dials

from .forward import Compute, divergences, losses, mix, packed, run_rows
from .training import Goal, Objective


def on_text(end: int, compute: Compute, *, answers: float, lean: bool = False) -> Objective:
    """Mean loss of tokens, those of answers weighted by `answers`."""

    def objective(model: LanguageModel, frozen: None, rows: UInt16[Array, "row token"]) -> Goal:
        batch = packed(rows, end, answers)
        found = losses(model, run_rows(model, batch, compute, lean=lean).hidden, batch)
        told = {"answers": (jnp.sum(found * batch.asked), jnp.sum(batch.asked) * 1.0)}
        return Goal(jnp.sum(found * batch.weights), jnp.sum(batch.weights), told)

    return objective


def on_layers(end: int, compute: Compute, layers: Sequence[int]) -> Objective:
    r"""How far the mixers of `layers` are from the teacher's, which each reads as they do.

    $$ \sum_l \sum_t \|o_{lt} - o^*_{lt}\|^2 \Big/ \sum_l \mathrm{mean}_t \|o^*_{lt}\|^2 $$

    λ is held: the teacher is matched exactly at λ = 0, so this objective would move it there.
    """
    chosen = tuple(layers)

    def objective(
        model: LanguageModel, teacher: LanguageModel, rows: UInt16[Array, "row token"]
    ) -> Goal:
        batch = packed(rows, end)
        taught = jax.lax.stop_gradient(run_rows(teacher, batch, compute, keep=chosen))
        model, counted = _held(model, chosen), batch.inputs != end
        total = jnp.zeros(())
        for layer in chosen:
            wanted = taught.mixed[layer].astype(jnp.float32)
            found = mix(model.blocks[layer], taught.normed[layer], batch).astype(jnp.float32)
            squares = jnp.sum(jnp.square(found - wanted), axis=-1)
            size = jnp.mean(jnp.sum(jnp.square(wanted), axis=-1))
            total = total + jnp.sum(squares * counted) / size
        return Goal(total / len(chosen), jnp.sum(counted) * 1.0, {})

    return objective


def on_teacher(
    end: int, compute: Compute, *, task: float, answers: float, lean: bool = False
) -> Objective:
    """KL divergence from a frozen teacher, mixed with the loss on text itself.

    Args:
        end: the token that ends documents.
        compute: dtype of the sequence.
        task: share of the loss on text, 0 to 1.
        answers: weight of tokens that answer a question.
        lean: as in `run_rows`.
    """

    def objective(
        model: LanguageModel, teacher: LanguageModel, rows: UInt16[Array, "row token"]
    ) -> Goal:
        batch = packed(rows, end, answers)
        taught = jax.lax.stop_gradient(run_rows(teacher, batch, compute).hidden)
        hidden = run_rows(model, batch, compute, lean=lean).hidden
        apart = divergences(model, hidden, teacher, taught)
        lost = losses(model, hidden, batch)
        mixed = (1 - task) * apart + task * lost
        weight, counted = jnp.sum(batch.weights), batch.weights > 0
        told = {
            "kl": (jnp.sum(apart * counted), jnp.sum(counted) * 1.0),
            "answers": (jnp.sum(lost * batch.asked), jnp.sum(batch.asked) * 1.0),
        }
        return Goal(jnp.sum(mixed * batch.weights), weight, told)

    return objective


def _held(model: LanguageModel, layers: Sequence[int]) -> LanguageModel:
    """The model with restorations that have no gradient."""
    for layer in layers:
        mixer = model.blocks[layer].mixer
        own = dials(mixer)
        if "restoration" in own:
            still = {"restoration": jax.lax.stop_gradient(own["restoration"])}
            model = eqx.tree_at(
                lambda model, at=layer: model.blocks[at].mixer, model, with_dials(mixer, still)
            )
    return model
