"""Mixers for training by name: of the catalogue, attention, or a model of the user's."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from design_models import CATALOGUE, ModelError
from layers import compile_layer
from layers.mixer import SequenceMixer
from layers.published import published_mixer
from layers.sources import Projected

from .models import MakeMixer, Mixer, SoftmaxAttention
from .plans import Plan
from .tasks.associative import AssociativeRecall
from .user_files import load_subject

ATTENTION = "attention"


def mixer_of(plan: Plan) -> MakeMixer:
    """(d_model, rng) -> mixer of a plan's models.

    A pair of vectors is whole where it stands, and pairs come in random order: a short convolution
    could only mix them, and mixers have none there.
    """
    make = mixer_maker(plan.layer, plan.heads, as_zoology=plan.as_zoology, expansion=plan.expansion)
    if not isinstance(plan.course.segments[0].rows, AssociativeRecall):
        return make
    return lambda d_model, rng: unconvolved(make(d_model, rng))


def unconvolved(mixer: Any) -> Any:
    """A mixer whose projections see their own token alone."""

    def alone(node: Any) -> Any:
        if not isinstance(node, Projected) or node.convolution is None:
            return node
        return eqx.tree_at(lambda one: one.convolution, node, None)

    return jax.tree.map(alone, mixer, is_leaf=lambda node: isinstance(node, Projected))


@cache  # a model of the user's is verified once, though asked for before the run and in it
def mixer_maker(
    layer: str, heads: int, *, as_zoology: bool = False, expansion: int | None = None
) -> MakeMixer:
    """Return (d_model, rng) -> mixer.

    Args:
        layer: a name of the catalogue, "attention", or FILE.py:OBJECT, a design model that is
            verified before it is compiled, at its own widths or, with FILE.py:OBJECT:WIDE, at those
            of the file's object WIDE, the same model wider.
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
                "FILE.py:OBJECT, or FILE.py:OBJECT:WIDE."
            )

        def make(d_model: int, rng: PRNGKeyArray) -> Mixer:
            wide = expansion or (2 if as_zoology and layer == "gated_deltanet" else 1)
            mixer = published_mixer(
                layer, d_model, heads, value_width=wide * (d_model // heads), rng=rng
            )
            return _ungated(mixer) if as_zoology else mixer

        return make
    from inference import NotLinearGaussian, verify  # needs ArviZ, which training itself does not

    narrow, wide = _named(layer)
    subject = load_subject(narrow)
    wider = None if wide is None else load_subject(wide).model
    try:
        certificate = verify(subject.model, name=subject.name, policy=subject.policy)
    except NotLinearGaussian as refused:
        raise ModelError(
            f"{narrow} is refused ({refused}); a wide model follows its narrow one, as in "
            "FILE.py:OBJECT:WIDE."
        ) from refused
    if not certificate.holds:
        raise ModelError(f"{layer} is not verified; see: mbd verify {narrow}.")

    def compiled(d_model: int, rng: PRNGKeyArray) -> Mixer:
        with jax.enable_x64(False):
            try:
                mixer = compile_layer(certificate, d_model, heads=heads, model=wider, rng=rng)
            except (NotLinearGaussian, ValueError) as refused:
                raise ModelError(f"{layer} cannot be compiled: {refused}") from refused
        return _ungated(mixer) if as_zoology else mixer

    return compiled


def _named(layer: str) -> tuple[str, str | None]:
    """FILE.py:OBJECT and, where it is asked for, FILE.py:WIDE."""
    file, mark, names = layer.rpartition(".py:")
    narrow, _, wide = names.partition(":")
    return f"{file}{mark}{narrow}", f"{file}{mark}{wide}" if wide else None


def _ungated(mixer: SequenceMixer) -> SequenceMixer:
    return eqx.tree_at(lambda one: one.gate, mixer, None, is_leaf=lambda node: node is None)
