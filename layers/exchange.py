"""What comes before a device's part, or after it, of parts that devices hold in order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

GATHERED = 4
"""Devices up to which all maps are gathered: a tree would send no less, in more rounds."""


def before[Map, State](
    axis: str,
    own: Map,
    combine: Callable[[Map, Map], Map],
    apply: Callable[[Map, State], State],
    initial: State,
    *,
    backwards: bool = False,
) -> State:
    """The state that a device's part starts with, inside `jax.shard_map`.

    Args:
        axis: whose devices hold the parts in order.
        own: what the device's part does.
        combine: what two parts do in turn.
        apply: the state after a part, of the state before it.
        initial: before the first part.
        backwards: whether the last device's part is the first.
    """
    devices, place = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    if backwards:
        place = devices - 1 - place
    if devices <= GATHERED:
        message, read = ravel_pytree(own)
        every, states = jax.lax.all_gather(message, axis), [initial]
        for part in range(devices - 1):
            holder = devices - 1 - part if backwards else part
            states.append(apply(read(every[holder]), states[-1]))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves)[place], *states)
    step = -1 if backwards else 1
    earlier, reach = _sent(own, axis, step), 1
    while reach < devices - 1:
        farther = combine(_sent(earlier, axis, step * reach), earlier)
        earlier = _where(place > reach, farther, earlier)
        reach *= 2
    return _where(place > 0, apply(earlier, initial), initial)


def _sent[Tree](tree: Tree, axis: str, distance: int) -> Tree:
    """What the device so many places before holds; zeros where there is none."""
    devices = range(jax.lax.axis_size(axis))
    ways = [(place, place + distance) for place in devices if place + distance in devices]
    message, read = ravel_pytree(tree)
    return read(jax.lax.ppermute(message, axis, ways))


def _where[Tree](condition: Array, first: Tree, second: Tree) -> Tree:
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), first, second)
