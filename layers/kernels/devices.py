r"""A sequence whose parts are held by several devices in order, by kernels.

A device finds the elements of its segments, and in a tree (`segments.running`) those of all
segments up to each: the last is the device's own. Devices exchange theirs, and each starts from the
belief that those before it leave (`layers.exchange`), with which all its segments start at once.

**Gradient.** What enters a device is what has left the one before, so that elements need no
derivative. A device finds what each of its segments asks of the belief that enters it, which is of
(Ψ, Λ, own M̄, own P̄) an affine map of the cotangents at the segment's end (`segments.Asked`), and in
a tree those of all segments from each; the first is the device's own. These are exchanged from the
last device to the first, and give the cotangents of what leaves each device, and each segment.

A head sends 5 numbers an entry of 64 × 64, and 4 for the gradient, whatever its widths.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.exchange import before

from . import segments
from .blocks import rates
from .elements import Element
from .forward import CHUNK
from .head import Head, over_rows

State = Float[Array, "key key"]


class Parts(NamedTuple):
    """Elements of a device's segments, in as many places as there may be."""

    each: Element
    until: Element  # of all up to the end of each


def enter(head: Head, axis: str, interpret: bool) -> tuple[Head, Parts]:
    """The head from the belief that enters this device's part, and what its segments do.

    Args:
        head: the part, and the belief before the first device's.
        axis: mesh axis whose devices hold the parts.
        interpret: whether kernels are simulated on a CPU.
    """
    chunks = len(head.key) // CHUNK

    def rows(number: int, head: Head) -> tuple[Parts, Element]:
        count = segments.count(number, chunks, tree=True)
        given = rates(head.noise, head.log_decay, head.starts, head.added)
        each = segments.of_segments(head.key, head.value, given, count, interpret=interpret)
        until = segments.running(each, partial(segments.combined, interpret=interpret))
        own = jax.tree.map(lambda part: part[:, -1], until)
        return segments.filled(Parts(each, until), chunks, tree=True), own

    def combine(_: int, first: Element, second: Element) -> Element:
        return segments.combined(first, second, interpret)

    def apply(_: int, element: Element, belief: tuple[Array, Array]) -> tuple[Array, Array]:
        passed = segments.passed(element, *belief, interpret)
        return passed.covariance, passed.mean

    parts, own = over_rows(rows)(head)
    initial = head.covariance, head.mean
    covariance, mean = before(axis, own, over_rows(combine), over_rows(apply), initial)
    return head._replace(covariance=covariance, mean=mean), parts


def leave(
    own: segments.Asked, of_last_mean: State, of_last_covariance: State, axis: str
) -> tuple[State, State]:
    """Cotangents of the belief after this device's part.

    Args:
        own: what the part asks of the belief that enters it.
        of_last_mean: cotangent of the mean after the part, what later parts ask of it aside.
        of_last_covariance: likewise, symmetric.
        axis: mesh axis whose devices hold the parts.
    """
    lasts = of_last_mean, of_last_covariance
    asked = segments.Asked(own.closed, own.crossed, *own.of_start(*lasts))
    nothing = jnp.zeros_like(of_last_mean), jnp.zeros_like(of_last_covariance)
    later = before(
        axis,
        asked,
        lambda later, earlier: earlier.before(later),
        lambda later, of_end: later.of_start(*of_end),
        nothing,
        backwards=True,
    )
    return lasts[0] + later[0], lasts[1] + later[1]


def of_first(state: State, axis: str) -> State:
    """A cotangent of the belief before the first device's part: that which the first has found."""
    return jnp.where(jax.lax.axis_index(axis) == 0, state, 0)
