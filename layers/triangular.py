r"""Inverses of small triangular matrices by matrix products, and Cholesky factors with theirs.

Substitution is sequential, and batched triangular solves are slow on every device; doubling is a
few matrix products,

$$ \begin{pmatrix} A & 0 \\ B & D \end{pmatrix}^{-1} =
   \begin{pmatrix} A^{-1} & 0 \\ -D^{-1} B A^{-1} & D^{-1} \end{pmatrix}, $$

and as stable as substitution up to a small factor: no power of the matrix is ever formed. (The
product (I − N)(I + N²)(I + N⁴)… is quicker and fails in float32 when keys repeat.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .precision import exact_product

Square = Float[Array, "row row"]


@jax.custom_vjp
def triangular_inverse(lower: Square) -> Square:
    r"""Inverse of a lower-triangular matrix whose width is a power of two times an odd number.

    Derivative: $\bar L = -\mathrm{tril}(X^\top \bar X X^\top)$ for X = L⁻¹.
    """
    return _invert(lower)


def _invert(lower: Square) -> Square:
    """Double the size of inverted diagonal blocks until one block is left."""
    width = lower.shape[-1]
    inverse = (1 / jnp.diagonal(lower))[:, None, None]
    size = 1
    while size < width:
        pairs = width // (2 * size)
        blocks = lower.reshape(pairs, 2 * size, pairs, 2 * size)
        own = blocks[jnp.arange(pairs), :, jnp.arange(pairs)]
        below = own[:, size:, :size]
        first, second = inverse[0::2], inverse[1::2]
        corner = -exact_product(exact_product(second, below), first)
        zero = jnp.zeros_like(first)
        top = jnp.concatenate([first, zero], axis=2)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)
        size *= 2
    return inverse[0]


def _invert_forward(lower: Square) -> tuple[Square, Square]:
    inverse = _invert(lower)
    return inverse, inverse


def _invert_backward(inverse: Square, cotangent: Square) -> tuple[Square]:
    return (-jnp.tril(exact_product(exact_product(inverse.T, cotangent), inverse.T)),)


triangular_inverse.defvjp(_invert_forward, _invert_backward)


@jax.custom_vjp
def cholesky_and_inverse(positive: Square) -> tuple[Square, Square]:
    r"""L and X = L⁻¹ of a positive definite G = L Lᵀ.

    Derivative, with $\Phi$ the lower triangle with its diagonal halved and
    $\bar L' = \bar L - \mathrm{tril}(X^\top \bar X X^\top)$:
    $\bar G = \mathrm{sym}(X^\top \Phi(L^\top \bar L') X)$.

    Source: Murray (2016), arXiv 1602.07527, eq. 10.
    """
    return _factor(positive)


def _factor(positive: Square) -> tuple[Square, Square]:
    lower = jnp.linalg.cholesky(positive, symmetrize_input=False)
    return lower, _invert(lower)


def _factor_forward(positive: Square):
    parts = _factor(positive)
    return parts, parts


def _factor_backward(parts: tuple[Square, Square], cotangents: tuple[Square, Square]):
    lower, inverse = parts
    of_lower, of_inverse = cotangents
    of_lower = of_lower + _invert_backward(inverse, of_inverse)[0]
    inner = jnp.tril(exact_product(lower.T, of_lower))
    inner = inner - jnp.diag(jnp.diagonal(inner)) / 2
    outer = exact_product(exact_product(inverse.T, inner), inverse)
    return ((outer + outer.T) / 2,)


cholesky_and_inverse.defvjp(_factor_forward, _factor_backward)
