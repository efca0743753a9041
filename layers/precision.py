"""The precision policy, in one place.

* **Parameters** are float32, and stay float32 in the optimiser.
* **Inputs** may be bfloat16 or float32 (float64 where it is enabled); they are cast to the dtype
  of the path that uses them.
* **Covariance path** (keys, decays, noise, gains, variances, log evidence): float32 always, its
  products at full float32 precision also where the hardware would rather multiply in fewer bits.
  In tf32 or bfloat16 a covariance loses definiteness for small noise and correlated keys.
* **Mean path** (the products that carry values): operands may be bfloat16; sums are float32.
* **States** are float32.

Range: prior variance over noise, times the squared norm of keys, up to `LARGEST_RATIO`. There, over
16,384 tokens whose keys have cosine .9, float32 in chunks is within 1e-4 of float64 (worst seen
5.3e-5, as token by token), and covariances stay definite. Parallel in time read-outs are within
3e-4. Beyond it the error grows as the root of the ratio, and in chunks covariances are still
definite at a ratio of 1e5 (tests/test_precision.py). Drift may raise a variance above the prior's
by as much as it likes: it then covers what is rounded.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

MeanDtype = Literal["float32", "bfloat16"]

LARGEST_RATIO = 1e4
"""Largest prior variance over noise for which the float32 covariance path holds 1e-4."""


def state_dtype(*arrays: Array | float):
    """float64 where an array is, else float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays in a dtype; other leaves as they are."""

    def of_leaf(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(of_leaf, tree)


def in_range(noise: Array, variance: Array) -> Array:
    """The noise, checked when the program runs: float32 must hold what it leaves of `variance`.

    Args:
        noise: of observations.
        variance: of each, from the prior.
    """
    if noise.dtype == jnp.float64:
        return noise
    return eqx.error_if(
        noise,
        variance > 1.001 * LARGEST_RATIO * noise,  # unit keys are so to rounding
        f"prior variance × ‖key‖² / noise exceeds {LARGEST_RATIO:g}, where float32 loses the "
        "covariance; raise `noise`, or enable float64",
    )


def exact_product(left: Array, right: Array) -> Array:
    """A product on the covariance path."""
    return jnp.matmul(left, right, precision="highest")


def mean_product(left: Array, right: Array, dtype: MeanDtype) -> Array:
    """A product on the mean path."""
    if dtype == "bfloat16":
        out = jnp.promote_types(left.dtype, jnp.float32)
        left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
        return jnp.matmul(left, right, preferred_element_type=out)
    return jnp.matmul(left, right, precision="highest" if left.dtype == jnp.float64 else None)
