r"""The cotangent of a restoration's λ, from what the gradient's recursion leaves.

λ_t multiplies a_t² P_{t−1} in the predicted covariance, whose cotangent is that of what the tokens
from t on see: with the chunk's own P, U and Ē (`kernels.reverse`), α and ρ the mean's decays,

$$ \bar\lambda_t = \langle \bar P^-_t, a_t^2 P_{t-1}\rangle
   = \bar q_t a_t^2 c_{t-1} + \sum_{s < t \le u} \Bigl(\prod_{r=t+1}^{u}\lambda_r\Bigr) T_{us}
     \Bigl(\prod_{r=s+1}^{t-1}\lambda_r\Bigr),\quad
   T_{us} = -\rho_{us}^2 \bigl(k_u^\top u_s\, \bar e_u^\top u_s + \bar v_u (x_u^\top u_s)^2\bigr) $$

where s is also the chunk's start, T_u = α_u² (ē_u·P k_u + v̄_u x_u·P x_u), and u also its end,
T_s = −ε_s² u_s·P̄' u_s, and ⟨P, P̄'⟩ α_C² from the start to the end. Nothing is divided by λ, so that
λ = 0 has its derivative. In XLA: three products of 64 × 64 × keys a chunk, and 64 × 64 × 64.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.precision import exact_product

from .blocks import kept_within
from .forward import CHUNK


def of_kept(
    head: Any,
    kept: dict[str, Array],
    found: dict[str, Array],
    numbers: Any,
    ratios: Float[Array, "chunk token token"],
    of_added: Float[Array, "chunk token"],
) -> Float[Array, " time"]:
    """λ̄ of one head.

    Args:
        head: what it filters (`kernels.exact.Head`).
        kept: what the forward pass has kept.
        found: what the recursion has left (`reverse.asked_of_kept`).
        numbers: of every token (`matrices.Numbers`).
        ratios: decay of the mean between tokens.
        of_added: cotangent of the variance added before each write.
    """
    width = head.key.shape[-1]

    def by_chunk(array):
        return array.reshape(-1, CHUNK, *array.shape[1:])

    key, query = (by_chunk(part.astype(jnp.float32)) for part in (head.key, head.query))
    moved, of_tied = by_chunk(kept["whitened"][:, :width]), by_chunk(found["tied"])
    alpha, drift, end, of_variance, faded, entered = map(
        by_chunk,
        (
            numbers.alpha,
            numbers.drift,
            numbers.end,
            numbers.of_variance,
            numbers.faded,
            found["entered"],
        ),
    )
    written, read, asked = (exact_product(part, moved.mT) for part in (key, query, of_tied))
    pairs = -(ratios**2) * (written * asked + of_variance[..., None] * read**2)
    at_end = jnp.sum(exact_product(moved, found["ends"]) * moved, axis=-1)
    start = kept["covariances"].astype(jnp.float32).sum(axis=1)
    through = alpha[:, -1] ** 2 * jnp.sum(start * found["ends"], axis=(-2, -1))
    # The chunk's start is a token before the others, its end one after them.
    earlier = jnp.concatenate([(alpha**2 * entered)[..., None], pairs], axis=-1)
    last = jnp.concatenate([through[:, None], -(end**2) * at_end], axis=-1)
    every = jnp.concatenate([earlier, last[:, None]], axis=1)
    within = kept_within(faded)
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
    later = within * lower
    later = jnp.concatenate([later, later[:, -1:]], axis=1)  # (u or end, t), for u ≥ t
    since = jnp.concatenate([jnp.exp(faded)[..., None], within * lower], axis=-1)
    none = jnp.zeros_like(since[:, :1]).at[..., 0].set(1)
    since = jnp.concatenate([none, since[:, :-1]], axis=1)  # (t, start or s), for s ≤ t − 1
    crossed = jnp.sum(exact_product(later.mT, every) * since, axis=-1)
    before = jnp.pad(drift, [(0, 0), (1, 0)])[:, :-1]
    decay = jnp.where(by_chunk(head.starts), 0, jnp.exp(2 * by_chunk(head.log_decay)))
    return (crossed + of_added * decay * before).reshape(-1)
