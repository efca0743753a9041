"""Bayesian Layers in place of delta rules, begun where they are the same: restoration 0."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers import LanguageModel, SequenceMixer, links
from layers.bayesian_layer import unit_interval
from layers.published import DRIFT_BIAS, gate_shapes
from layers.sources import PerHead, Projected
from layers.strength import StrengthMemory, doubled_sigmoid


@dataclass(frozen=True)
class OfChosen:
    """A link: a number in [0, 1] of chosen heads, which learns; 0 of the others, which does not."""

    chosen: tuple[bool, ...]

    def __call__(self, number: Float[Array, " heads"]) -> Float[Array, " heads"]:
        return jnp.where(jnp.asarray(self.chosen), unit_interval(number), 0.0)


def with_restoration(
    model: LanguageModel,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    restoration: float = 0.0,
) -> LanguageModel:
    r"""Let chosen heads keep their covariance, by a restoration λ that training moves.

    $$ P^- = \lambda\,(a P a + q) + (1 - \lambda) I $$

    Each gets a λ and a drift q, softplus of a projection that begins as 0 plus `DRIFT_BIAS`; all
    other weights stay as they are. At λ = 0 logits are those of `model` to rounding. Where λ is
    above 0, noise is at least 1 / `LARGEST_RATIO`.

    All heads of a chosen layer are computed with covariances, also those not chosen.

    Args:
        model: as `recall.checkpoints.folder.read_checkpoint` returns it.
        layers: numbers of blocks, from 0; all where left out.
        heads: numbers of heads in each of these blocks, from 0; all where left out.
        restoration: λ to begin with.

    Raises:
        ValueError: there is no such layer or head, `restoration` lies outside [0, 1], or a layer is
            no delta rule, is restored already, or writes with strengths up to 2, which is no
            reading of any noise.
    """
    if not 0 <= restoration <= 1:
        raise ValueError(f"`restoration` is {restoration}; it must lie between 0 and 1.")
    layers = _numbers("layers", layers, len(model.blocks))
    for layer in layers:
        mixer = model.blocks[layer].mixer
        restored = _restored(mixer, _numbers("heads", heads, mixer.heads), restoration)
        model = eqx.tree_at(lambda model, at=layer: model.blocks[at].mixer, model, restored)
    return model


def _restored(mixer: SequenceMixer, heads: Sequence[int], restoration: float) -> SequenceMixer:
    memory = mixer.memory
    if not isinstance(memory, StrengthMemory):
        raise ValueError(f"`layers` name a {mixer.name}; only a checkpoint's delta rules can be.")
    if "restoration" in mixer.sources:
        raise ValueError("`layers` name one that is restored already; name it once.")
    strength = mixer.sources["strength"]
    if isinstance(strength, Projected) and strength.link is doubled_sigmoid:
        raise ValueError(
            "`layers` name one with negative eigenvalues, whose strengths above 1 are no reading "
            "of any noise; leave it out."
        )
    chosen = tuple(head in heads for head in range(mixer.heads))
    dial = jnp.where(jnp.asarray(chosen), restoration, 0.0)
    gates = {name: mixer.sources[name] for name, _ in memory.widths}
    gates["restoration"] = PerHead(dial, OfChosen(chosen))
    gates["drift"] = _small_drift(mixer)
    sources = mixer.sources | gates
    memory = replace(memory, widths=gate_shapes(gates))
    return eqx.tree_at(lambda mixer: (mixer.memory, mixer.sources), mixer, (memory, sources))


def _small_drift(mixer: SequenceMixer) -> Projected:
    """A drift that begins the same at every token."""
    drift = Projected(
        mixer.d_model, mixer.heads, (), links.drift, bias=DRIFT_BIAS, rng=jax.random.key(0)
    )
    return eqx.tree_at(lambda drift: drift.weight, drift, jnp.zeros_like(drift.weight))


def _numbers(name: str, given: Sequence[int] | None, count: int) -> Sequence[int]:
    if given is None:
        return range(count)
    wrong = [number for number in given if not 0 <= number < count]
    if wrong:
        raise ValueError(f"`{name}` holds {wrong[0]}; there are {count}, from 0 on.")
    return given
