"""Bayesian Layers in place of delta rules, begun where they are the same: restoration 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from layers import LanguageModel, SequenceMixer, links
from layers.bayesian_layer import unit_interval
from layers.published import DRIFT_BIAS, gate_shapes
from layers.sources import PerHead, Projected
from layers.strength import StrengthMemory, doubled_sigmoid


@dataclass(frozen=True)
class OfChosen:
    """A link to the restoration of chosen heads; 0 of the others, which does not learn.

    Args:
        chosen: which heads.
        by_logit: λ = σ(number), which gradient steps of one size bring from near 0 to near 1, and
            there to any horizon 1/(1 − λ); otherwise λ is the number, which may be 0 or 1.
    """

    chosen: tuple[bool, ...]
    by_logit: bool = False

    def __call__(self, number: Float[Array, " heads"]) -> Float[Array, " heads"]:
        dial = jax.nn.sigmoid(number) if self.by_logit else unit_interval(number)
        return jnp.where(jnp.asarray(self.chosen), dial, 0.0)


@dataclass(frozen=True)
class Restoration:
    """How a layer is restored.

    Args:
        heads: which of its heads.
        exact: whether all are, for good: then no λ is left, and kernels take the filter.
        by_logit: as in `OfChosen`.
        learned: whether training moves λ.
    """

    heads: tuple[int, ...]
    exact: bool = False
    by_logit: bool = False
    learned: bool = True


def with_restoration(
    model: LanguageModel,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    restoration: float = 0.0,
    learned: bool = True,
) -> LanguageModel:
    r"""Let chosen heads keep their covariance, by a restoration λ that training moves.

    $$ P^- = \lambda\,(a P a + q) + (1 - \lambda)\,\sigma^2 I,\quad
       r = \sigma^2 (1/\beta - |k|^2) $$

    Each gets a λ, a σ², which begins as 1, the variance that documents start from, and a drift
    q = (1 − a²) p, p a projection that begins as 1: where nothing is written, the covariance stays
    that of the delta rule, whatever its decay. (A small constant drift instead would let the
    covariance of a head that decays fast vanish, and with it what it writes.) Where nothing decays
    the drift begins as softplus of `DRIFT_BIAS`, which is small. All other weights stay as they
    are. At λ = 0 logits are those of `model` to rounding. Where λ is above 0, noise is at least
    max(σ², 1) / `LARGEST_RATIO`.

    All heads of a chosen layer are computed with covariances, also those not chosen. Where all are
    restored for good, at λ = 1, no λ is left in the layer, and kernels run it where they apply.

    Args:
        model: as `recall.checkpoints.folder.read_checkpoint` returns it.
        layers: numbers of blocks, from 0; all where left out.
        heads: numbers of heads in each of these blocks, from 0; all where left out.
        restoration: λ to begin with; between 0 and 1 its logit learns.
        learned: whether training moves λ.

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
        chosen = tuple(sorted(set(_numbers("heads", heads, mixer.heads))))
        exact = restoration == 1 and not learned and len(chosen) == mixer.heads
        how = Restoration(chosen, exact, 0 < restoration < 1, learned)
        restored = restored_mixer(mixer, how, restoration)
        model = eqx.tree_at(lambda model, at=layer: model.blocks[at].mixer, model, restored)
    return model


def restored_mixer(
    mixer: SequenceMixer, how: Restoration, restoration: float = 0.5
) -> SequenceMixer:
    """A delta rule's mixer with covariances.

    Raises:
        ValueError: as in `with_restoration`.
    """
    memory = mixer.memory
    if not isinstance(memory, StrengthMemory):
        raise ValueError(f"`layers` name a {mixer.name}; only a checkpoint's delta rules can be.")
    if restoration_of(mixer) is not None:
        raise ValueError("`layers` name one that is restored already; name it once.")
    strength = mixer.sources["strength"]
    if isinstance(strength, Projected) and strength.link is doubled_sigmoid:
        raise ValueError(
            "`layers` name one with negative eigenvalues, whose strengths above 1 are no reading "
            "of any noise; leave it out."
        )
    gates: dict[str, Any] = {name: mixer.sources[name] for name, _ in memory.widths}
    if not how.exact:
        chosen = tuple(head in how.heads for head in range(mixer.heads))
        number = float(np.log(restoration / (1 - restoration))) if how.by_logit else restoration
        dial = jnp.where(jnp.asarray(chosen), number, jnp.zeros(mixer.heads))
        link = OfChosen(chosen, how.by_logit)
        gates["restoration"] = PerHead(dial, link, learned=how.learned)
    gates |= _begun_alike(mixer)
    gates["reset"] = PerHead(jnp.zeros(mixer.heads), jnp.exp)
    sources = mixer.sources | gates
    memory = replace(memory, widths=gate_shapes(gates))
    return eqx.tree_at(lambda mixer: (mixer.memory, mixer.sources), mixer, (memory, sources))


def restoration_of(mixer: SequenceMixer) -> Restoration | None:
    """How a checkpoint's mixer is restored; None where it is a delta rule."""
    if _kept_by(mixer) is None:
        return None
    dial = mixer.sources.get("restoration")
    if dial is None:
        return Restoration(tuple(range(mixer.heads)), exact=True, learned=False)
    assert isinstance(dial, PerHead)
    assert isinstance(dial.link, OfChosen)
    heads = tuple(head for head, chosen in enumerate(dial.link.chosen) if chosen)
    return Restoration(heads, False, dial.link.by_logit, dial.learned)


def dials(mixer: SequenceMixer) -> dict[str, Array]:
    """What a restored mixer has beside its delta rule's weights, by name."""
    return _dials(mixer)


def _dials(mixer: Any) -> dict[str, Any]:
    sources = mixer.sources
    found = {"reset": sources["reset"].parameter}
    name = _kept_by(mixer)
    assert name is not None
    found |= {f"{name}.weight": sources[name].weight, f"{name}.bias": sources[name].bias}
    if "restoration" in sources:
        found["restoration"] = sources["restoration"].parameter
    return found


def with_dials(mixer: SequenceMixer, values: Mapping[str, Any]) -> SequenceMixer:
    """A restored mixer with these numbers for some of its `dials`."""
    return eqx.tree_at(
        lambda mixer: [_dials(mixer)[name] for name in values], mixer, list(values.values())
    )


def _kept_by(mixer: Any) -> str | None:
    """What a covariance is kept with: a stationary variance or a drift; None where it is reset."""
    return next((name for name in ("stationary", "drift") if name in mixer.sources), None)


def restorations(model: LanguageModel) -> dict[int, np.ndarray]:
    """λ of every head, by number of the restored layer."""
    found = {}
    for layer, block in enumerate(model.blocks):
        if restoration_of(block.mixer) is not None:
            dial: Any = block.mixer.sources.get("restoration")
            ones = np.ones(block.mixer.heads)
            found[layer] = ones if dial is None else np.asarray(dial.link(dial.parameter))
    return found


def _begun_alike(mixer: SequenceMixer) -> dict[str, Projected]:
    """The stationary variance, or where nothing decays the drift: at first the same everywhere."""
    decays = "log_decay" in mixer.sources
    link, bias = (links.stationary_variance, 0.0) if decays else (links.drift, DRIFT_BIAS)
    projected = Projected(mixer.d_model, mixer.heads, (), link, bias=bias, rng=jax.random.key(0))
    still = eqx.tree_at(lambda part: part.weight, projected, jnp.zeros_like(projected.weight))
    return {"stationary" if decays else "drift": still}


def _numbers(name: str, given: Sequence[int] | None, count: int) -> Sequence[int]:
    if given is None:
        return range(count)
    wrong = [number for number in given if not 0 <= number < count]
    if wrong:
        raise ValueError(f"`{name}` holds {wrong[0]}; there are {count}, from 0 on.")
    return given
