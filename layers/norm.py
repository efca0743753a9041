"""Root-mean-square norm."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RootMeanSquareNorm(eqx.Module):
    """Scaled to a root mean square of 1 over the last axis, then by one number per channel.

    Args:
        scale: of each channel.
        epsilon: added to the mean square, in squared units of what is normed.
    """

    scale: Float[Array, " channel"]
    epsilon: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*rows channel"]) -> Float[Array, "*rows channel"]:
        exact = x.astype(jnp.float32)
        squares = jnp.mean(exact**2, axis=-1, keepdims=True)
        return (exact * jax.lax.rsqrt(squares + self.epsilon) * self.scale).astype(x.dtype)
