"""From a certificate to a sequence layer."""

from collections.abc import Mapping

import jax
from jaxtyping import PRNGKeyArray

from design_models import DesignModel
from inference.certificate import Certificate

from . import links as link_functions
from .compiled import compile_filter
from .mixer import SequenceMixer, Source
from .published import DRIFT_BIAS, SHORT_CONVOLUTION, sharing
from .scans import Algorithm
from .sources import Link, Projected, identity, unit

KEPT_BIAS = 4.0
"""Decays and forget rates start near σ(4) = 0.98."""

LINKS: dict[str, tuple[Link, float | None, int | None]] = {
    "key": (unit, None, SHORT_CONVOLUTION),
    "query": (unit, None, SHORT_CONVOLUTION),
    "value": (identity, None, SHORT_CONVOLUTION),
    "decay": (link_functions.sigmoid, KEPT_BIAS, None),
    "forget": (link_functions.sigmoid, KEPT_BIAS, None),
    "drift": (link_functions.drift, DRIFT_BIAS, None),
    "noise": (link_functions.bounded_softplus, 0.0, None),
    "output_noise": (link_functions.softplus, 0.0, None),
}
"""Link, initial bias and convolution taps of the inputs that have a name of their own."""


def compile_layer(
    certificate: Certificate,
    d_model: int,
    *,
    heads: int = 1,
    key_heads: int | None = None,
    model: DesignModel | None = None,
    links: Mapping[str, Link] | None = None,
    algorithm: Algorithm | None = None,
    rng: PRNGKeyArray,
) -> SequenceMixer:
    """Compile a verified filter into an Equinox layer that trains.

    Every input of the design model is projected from the sequence, head by head, and passed through
    a link into its range: keys and queries have length 1, `decay` and `forget` lie in (0, 1),
    `noise`, `drift` and `output_noise` are positive. Keys, queries and values are short-convolved.

    Args:
        certificate: what `inference.verify` returned for the model.
        d_model: width of the sequence.
        heads: memories side by side, each with inputs of its own.
        key_heads: heads that have a `key` and a `query` of their own, shared by groups of heads;
            all where left out.
        model: the same design model at the widths wanted; the verified one where left out.
        links: for inputs of other names (or to change a link): `{"gate": jax.nn.sigmoid}`.
        algorithm: how sequences are computed; the fastest that the structure allows where left out.
        rng: for the initial parameters.

    Returns:
        A layer: `outputs, prediction = layer(x)`, x (time, d_model); `layer.memory.why` says why
        its memory runs in the general form, where it does, and `layer.memory.backend` what programs
        run it: kernels, for a model whose rows share one covariance and whose keys do not mix.

    Raises:
        TypeError: `certificate` is not a certificate.
        ValueError: it does not hold, an input has no link, or `key_heads` does not divide `heads`.
        NotLinearGaussian: the wider model is refused, or has another structure.
    """
    memory = compile_filter(certificate, model, algorithm=algorithm)
    groups = sharing(heads, key_heads)
    given = {} if links is None else dict(links)
    unknown = sorted(set(given) - set(memory.inputs))
    if unknown:
        raise ValueError(f"`links` names {unknown}; the model reads {sorted(memory.inputs)}.")
    missing = sorted(set(memory.inputs) - set(LINKS) - set(given))
    if missing:
        raise ValueError(
            f"the model reads {missing}, whose range is not known by name; pass `links`, as in "
            f'links={{"{missing[0]}": jax.nn.sigmoid}}.'
        )
    rng_mixer, *rngs = jax.random.split(rng, len(memory.inputs) + 1)
    sources: dict[str, Source] = {}
    for (name, shape), rng_source in zip(sorted(memory.inputs.items()), rngs, strict=True):
        link, bias, taps = LINKS.get(name, (identity, 0.0, None))
        sources[name] = Projected(
            d_model,
            heads,
            shape,
            given.get(name, link),
            bias=bias,
            taps=taps,
            groups=groups if name in ("key", "query") else 1,
            rng=rng_source,
        )
    return SequenceMixer(
        memory, d_model, heads, sources, name=f"compiled {certificate.name}", rng=rng_mixer
    )
