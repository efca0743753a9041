"""Generic inputs: what is true of a coefficient at all of them is taken for true at every input."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .branches import DRAW, CannotFollow, with_open_choices
from .extraction import step_coefficients
from .linear_gaussian import Step
from .partition import Partition
from .proof import Proof

_JITTER = 0.3
_FEWEST = 2
"""Fewest draws from which structure is read."""


def generic_steps(
    proof: Proof, partition: Partition, examples: Mapping[str, Array]
) -> tuple[Step, dict[str, Array]]:
    """Coefficients at the examples and at generic inputs around them, and those inputs.

    Where a coefficient is not finite only the examples are kept: a number near an example may lie
    where the model makes no sense, as a decay above 1 does under a drift of 1 − decay².
    """
    inputs = jittered(examples)
    steps = jax.jit(jax.vmap(lambda u: step_coefficients(proof, partition, u)))(inputs)
    kept = _finite(steps)
    kept[: len(jax.tree.leaves(examples)[0])] = True
    return jax.tree.map(lambda leaf: leaf[kept], (steps, inputs))


def open_steps(
    proof: Proof, partition: Partition, examples: Mapping[str, Array]
) -> tuple[Step, tuple[str, ...]] | None:
    """Coefficients at generic inputs with every choice of theirs left open, and where they choose.

    What holds for these holds for every input (`inference.branches`). None where the choices
    cannot be left open.
    """

    def real(name: str, array: Array) -> Array:
        if jnp.issubdtype(array.dtype, jnp.inexact):
            return array
        rng = jax.random.key(zlib.crc32(name.encode()))
        return array + jax.random.uniform(rng, array.shape, float, 0.2, 0.8)

    inputs = {name: real(name, array) for name, array in jittered(examples).items()}
    draws = len(jax.tree.leaves(inputs)[0])
    try:
        evaluate, places = with_open_choices(
            lambda u: step_coefficients(proof, partition, u),
            {name: array[0] for name, array in examples.items()},
        )
        unknown = jax.random.normal(jax.random.key(1), (draws, DRAW), float)
        steps = jax.jit(jax.vmap(evaluate))(inputs, unknown)
    except CannotFollow:
        return None
    kept = _finite(steps)
    if np.sum(kept) < _FEWEST:
        return None
    return jax.tree.map(lambda leaf: leaf[kept], steps), places


def _finite(steps: Step) -> np.ndarray:
    """Which draws have finite coefficients."""
    leaves = jax.tree.leaves(steps)
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


def jittered(examples: Mapping[str, Array]) -> dict[str, Array]:
    """The examples, the same with every number a little smaller, and the same, a little larger.

    Numbers are multiplied by random factors; a zero, which factors leave alone, becomes positive.
    """

    def jitter(array: Array, rng: Array) -> list[Array]:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return [array, array]
        change = jax.random.uniform(rng, (2, *array.shape), array.dtype, maxval=_JITTER)
        zero = array == 0
        return [
            jnp.where(zero, change[0], array * (1 - change[0])),
            jnp.where(zero, change[1], array * (1 + change[1])),
        ]

    return {
        name: jnp.concatenate([array, *jitter(array, jax.random.key(index))])
        for index, (name, array) in enumerate(sorted(examples.items()))
    }
