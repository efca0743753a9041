"""Mixers for training by name: of the catalogue, attention, or a model of the user's."""

from functools import cache

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from design_models import CATALOGUE, ModelError
from layers import compile_layer
from layers.mixer import SequenceMixer
from layers.published import published_mixer

from .models import MakeMixer, Mixer, SoftmaxAttention
from .user_files import load_subject

ATTENTION = "attention"


@cache  # a model of the user's is verified once, though asked for before the run and in it
def mixer_maker(
    layer: str, heads: int, *, as_zoology: bool = False, expansion: int | None = None
) -> MakeMixer:
    """Return (d_model, rng) -> mixer.

    Args:
        layer: a name of the catalogue, "attention", or FILE.py:OBJECT, a design model that is
            verified before it is compiled, at its own widths.
        heads: memories side by side.
        as_zoology: without an output gate, and Gated DeltaNet with values twice as wide as keys.
        expansion: how many times as wide as keys values are; as published where left out.

    Raises:
        ModelError: there is no such layer, the model is not verified, or the layer's values have
            a width of their own.
    """
    if expansion is not None and layer not in CATALOGUE:
        raise ModelError(
            f"`--expansion` is {expansion}, but the widths of {layer} are its own; leave it out."
        )
    if layer == ATTENTION:
        return lambda d_model, rng: SoftmaxAttention(d_model, heads, rng=rng)
    if ".py" not in layer:
        if layer not in CATALOGUE:
            raise ModelError(
                f"`--layer` is {layer!r}; it must be one of {', '.join(CATALOGUE)}, {ATTENTION}, "
                "or FILE.py:OBJECT."
            )

        def make(d_model: int, rng: PRNGKeyArray) -> Mixer:
            wide = expansion or (2 if as_zoology and layer == "gated_deltanet" else 1)
            mixer = published_mixer(
                layer, d_model, heads, value_width=wide * (d_model // heads), rng=rng
            )
            return _ungated(mixer) if as_zoology else mixer

        return make
    from inference import verify  # needs ArviZ, which training itself does not

    subject = load_subject(layer)
    certificate = verify(subject.model, name=subject.name, policy=subject.policy)
    if not certificate.holds:
        raise ModelError(f"{layer} is not verified; see: mbd verify {layer}.")

    def compiled(d_model: int, rng: PRNGKeyArray) -> Mixer:
        with jax.enable_x64(False):
            mixer = compile_layer(certificate, d_model, heads=heads, rng=rng)
        return _ungated(mixer) if as_zoology else mixer

    return compiled


def _ungated(mixer: SequenceMixer) -> SequenceMixer:
    return eqx.tree_at(lambda one: one.gate, mixer, None, is_leaf=lambda node: node is None)
