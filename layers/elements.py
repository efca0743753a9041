r"""A stretch of tokens as one map of beliefs, and how maps follow each other.

Of a stretch, A is the closed loop, (b, C) the belief after it from a memory that is known to be 0,
and (η, J) what its values say about the memory before it. Rows of M share P, so

$$ P' = A (I + P J)^{-1} P A^\top + C,\quad M' = (M + \eta P) (I + J P)^{-1} A^\top + b $$

whatever the belief before it: the map of two stretches is again one of these, so they may be
combined in any grouping, in a tree, or between devices.

Source: Särkkä & García-Fernández (2021), IEEE TAC 66(1), eqs. 10-17.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .precision import exact_product

Means = Float[Array, "*batch row width"]
Squares = Float[Array, "*batch width width"]


class Element(eqx.Module):
    """One stretch's map, or those of several along leading axes."""

    transition: Squares  # A
    mean: Means  # b
    covariance: Squares  # C
    information: Means  # η
    precision: Squares  # J


def combine(first: Element, second: Element) -> Element:
    """The map of two stretches, `first` before `second`."""
    width = first.covariance.shape[-1]
    seen = first.mean + exact_product(second.information, first.covariance)
    system = _system(first.covariance, second.precision)
    right = jnp.concatenate([first.covariance, first.transition, seen.mT], axis=-1)
    covariance, transition, mean = jnp.split(solve(system, right), (width, 2 * width), axis=-1)
    information = second.information - exact_product(first.mean, second.precision)
    spread = exact_product(exact_product(second.transition, covariance), second.transition.mT)
    said = exact_product(exact_product(transition.mT, second.precision), first.transition)
    return Element(
        exact_product(second.transition, transition),
        exact_product(mean.mT, second.transition.mT) + second.mean,
        _symmetric(spread) + second.covariance,
        exact_product(information, transition) + first.information,
        _symmetric(said) + first.precision,
    )


def apply(element: Element, mean: Means, covariance: Squares) -> tuple[Means, Squares]:
    """Mean and covariance after a stretch, of the belief before it."""
    seen = mean + exact_product(element.information, covariance)
    right = jnp.concatenate([covariance, seen.mT], axis=-1)
    solved = solve(_system(covariance, element.precision), right)
    inner, seen = jnp.split(solved, [covariance.shape[-1]], axis=-1)
    spread = exact_product(exact_product(element.transition, inner), element.transition.mT)
    after = exact_product(seen.mT, element.transition.mT) + element.mean
    return after, _symmetric(spread) + element.covariance


def _system(covariance: Squares, precision: Squares) -> Squares:
    identity = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
    return identity + exact_product(covariance, precision)


def solve(matrix: Squares, right: Float[Array, "*batch width column"]) -> Array:
    """Solve; matrices of one number are divided by."""
    return right / matrix if matrix.shape[-1] == 1 else jnp.linalg.solve(matrix, right)


def _symmetric(square: Squares) -> Squares:
    return (square + square.mT) / 2
