r"""Beliefs between chunks by an associative scan: all chunks work at once, at any batch size.

A chunk, or a run of chunks, acts on the covariance at its start through (A, C, J, ρ),

$$ P \mapsto ρ A^\top (I + P J)^{-1} P A + C, $$

which its own tokens determine; these compose associatively. Given each chunk's covariance the
means pass through the closed loops, $M \mapsto M Ψ + B$: again associative.

Source: Särkkä & García-Fernández (2021), "Temporal parallelization of Bayesian smoothers".
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chunks import map_grouped
from .chunk import Closed, Prepared, advance, closed_loop
from .tokens import State


class Element(eqx.Module):
    """Map of the covariance from one end of a run of chunks to the other."""

    transition: Float[Array, "*chunk key key"]
    covariance: Float[Array, "*chunk key key"]
    information: Float[Array, "*chunk key key"]
    power: Float[Array, "*chunk"]


def beliefs(
    prepared: Prepared, initial: State, fresh: State | None, group: int
) -> tuple[State, State]:
    """Return the beliefs at the chunks' starts, stacked, and the one after the last."""
    nothing = jax.tree.map(jnp.zeros_like, initial)

    def element(now):
        end, _ = advance(now, nothing, fresh)
        closed = closed_loop(now, nothing, fresh)
        return Element(closed.transition, end.covariance, closed.information, closed.power)

    elements = map_grouped(element, prepared, group)
    passed = jax.lax.associative_scan(jax.vmap(combine), elements)
    ends = jax.vmap(apply, (0, None))(passed, initial.covariance)
    covariances = jnp.concatenate([initial.covariance[None], ends[:-1]])

    def affine(now):
        now, covariance = now
        closed = closed_loop(now, State(nothing.mean, covariance), fresh)
        return closed.transition, closed.write

    transitions, writes = map_grouped(affine, (prepared, covariances), group)

    def compose(left, right):
        transition, write = left
        following, added = right
        return transition @ following, write @ following + added

    transitions, writes = jax.lax.associative_scan(compose, (transitions, writes))
    means = initial.mean @ transitions + writes
    starts = State(jnp.concatenate([initial.mean[None], means[:-1]]), covariances)
    return starts, State(means[-1], ends[-1])


def combine(first: Element, second: Element) -> Element:
    """Return `first`, then `second`, as one element."""
    width = first.transition.shape[-1]
    coupling = jnp.eye(width, dtype=first.covariance.dtype) + second.information @ first.covariance
    right = jnp.concatenate([second.transition, second.information @ first.transition.T], axis=1)
    solved = jnp.linalg.solve(coupling, right)
    kept, learnt = solved[:, :width], solved[:, width:]
    covariance = second.power * second.transition.T @ first.covariance @ kept + second.covariance
    information = first.power * first.transition @ learnt + first.information
    return Element(
        transition=first.transition @ kept,
        covariance=_symmetric(covariance),
        information=_symmetric(information),
        power=first.power * second.power,
    )


def apply(element: Element, covariance: Float[Array, "key key"]) -> Float[Array, "key key"]:
    """Take a covariance through an element."""
    coupling = jnp.eye(covariance.shape[0], dtype=covariance.dtype)
    coupling = coupling + element.information @ covariance
    kept = jnp.linalg.solve(coupling, element.transition)
    moved = element.power * element.transition.T @ covariance @ kept
    return _symmetric(moved + element.covariance)


def belief_cotangent(closed: Closed, source: State, end_bar: State) -> State:
    """Return the cotangent of the belief at a chunk's start from that at its end."""
    mean_bar = end_bar.mean @ closed.transition.T
    covariance_bar = closed.transition @ end_bar.covariance @ closed.transition.T
    covariance_bar = closed.power * covariance_bar + closed.pull.T @ mean_bar + source.covariance
    return State(mean_bar + source.mean, _symmetric(covariance_bar))


def pass_back(closed: Closed, sources: State, final_bar: State) -> tuple[State, State]:
    """Return the cotangents of the belief at each chunk's end, and of the initial one."""

    def compose_means(later, earlier):
        transition, source = later
        previous, added = earlier
        return previous @ transition, source @ previous.mT + added

    def before(bars, final):
        return jnp.concatenate([bars[1:], final[None]])

    mean_elements = closed.transition, sources.mean
    transitions, mean_sums = jax.lax.associative_scan(compose_means, mean_elements, reverse=True)
    mean_bars = final_bar.mean @ transitions.mT + mean_sums
    mean_ends = before(mean_bars, final_bar.mean)

    def compose_covariances(later, earlier):
        transition, source, power = later
        previous, added, previous_power = earlier
        moved = previous_power[:, None, None] * (previous @ source @ previous.mT)
        return previous @ transition, moved + added, power * previous_power

    pulled = closed.pull.mT @ mean_ends @ closed.transition.mT
    sums = _symmetric(pulled + sources.covariance)
    elements = closed.transition, sums, closed.power
    transitions, sums, powers = jax.lax.associative_scan(
        compose_covariances, elements, reverse=True
    )
    moved = transitions @ final_bar.covariance @ transitions.mT
    bars = powers[:, None, None] * moved + sums
    ends_bar = State(mean_ends, before(bars, _symmetric(final_bar.covariance)))
    return ends_bar, State(mean_bars[0], bars[0])


def _symmetric(matrix: Float[Array, "*chunk key key"]) -> Float[Array, "*chunk key key"]:
    return (matrix + matrix.mT) / 2
