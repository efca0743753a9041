r"""Inverses of small triangular matrices by matrix products, and Cholesky factors with theirs.

Substitution is sequential, and batched triangular solves are slow on every device; doubling is a
few matrix products,

$$ \begin{pmatrix} A & 0 \\ B & D \end{pmatrix}^{-1} =
   \begin{pmatrix} A^{-1} & 0 \\ -D^{-1} B A^{-1} & D^{-1} \end{pmatrix}, $$

and as stable as substitution up to a small factor: no power of the matrix is ever formed. (The
product (I − N)(I + N²)(I + N⁴)… is quicker and fails in float32 when keys repeat.)
"""

from collections.abc import Callable

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


def cholesky_and_inverse(
    positive: Square, congruence: Callable[[Square], Square]
) -> tuple[Square, Square]:
    r"""L and X = L⁻¹ of a positive definite G = L Lᵀ that rounding may have made indefinite.

    A factor of G with its diagonal raised by a few units of rounding always exists; it is then
    corrected by a factor of X G Xᵀ, near the identity, so the raise leaves no trace. Where X G Xᵀ
    is computed from what G was made of, G's own rounding leaves none either.

    Args:
        positive: G; gradients are those of its exact factor.
        congruence: X G Xᵀ of a lower-triangular X; without a gradient.
    """
    still = jax.lax.stop_gradient(positive)
    raise_ = len(still) * jnp.finfo(still.dtype).eps
    lower, inverse = _factor(still + raise_ * jnp.diag(jnp.diagonal(still)))
    white = congruence(inverse)
    root, correction = _factor((white + white.T) / 2)
    return factors(positive, exact_product(lower, root), exact_product(correction, inverse))


def _factor(positive: Square) -> tuple[Square, Square]:
    lower = jnp.linalg.cholesky(positive, symmetrize_input=False)
    return lower, _invert(lower)


@jax.custom_vjp
def factors(positive: Square, lower: Square, inverse: Square) -> tuple[Square, Square]:
    r"""L and X = L⁻¹ of G, already found, with the gradient that they have as functions of G.

    With $\Phi$ the lower triangle with its diagonal halved and
    $\bar L' = \bar L - \mathrm{tril}(X^\top \bar X X^\top)$:
    $\bar G = \mathrm{sym}(X^\top \Phi(L^\top \bar L') X)$.

    Source: Murray (2016), arXiv 1602.07527, eq. 10.
    """
    return lower, inverse


def _factors_forward(positive: Square, lower: Square, inverse: Square):
    return (lower, inverse), (lower, inverse)


def _factors_backward(parts: tuple[Square, Square], cotangents: tuple[Square, Square]):
    lower, inverse = parts
    of_lower, of_inverse = cotangents
    of_lower = of_lower + _invert_backward(inverse, of_inverse)[0]
    inner = jnp.tril(exact_product(lower.T, of_lower))
    inner = inner - jnp.diag(jnp.diagonal(inner)) / 2
    outer = exact_product(exact_product(inverse.T, inner), inverse)
    zero = jnp.zeros_like(lower)
    return (outer + outer.T) / 2, zero, zero


factors.defvjp(_factors_forward, _factors_backward)
