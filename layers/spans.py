r"""Products of decays between the tokens of one chunk.

Between tokens s and t the memory is multiplied by $\Phi(t,s) = \prod_{s<u\le t} a_u$. Quotients of
cumulative products overflow under strong decay and differences of cumulative logs lose digits, so
every Φ is a product of factors in [0, 1]: an underflow is then a true zero, and a decay of exactly
0 is allowed. Where a packed document starts, the products that cross its start are zero.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 8
"""Tokens whose products are formed pair by pair; a chunk is a multiple of it."""


class Blocks(eqx.Module):
    """Φ(t, s) in factors: block by block, and from a block's start and to a later block's start.

    Args:
        within: Φ(t, s) for s <= t in one block, else 0.
        rows: Φ from the start of t's block to t, its own decay included.
        columns: Φ from s to the start of each later block, zero for the others.
    """

    within: Float[Array, "block inner inner width"]
    rows: Float[Array, "block inner width"]
    columns: Float[Array, "block block inner width"]

    def scores(
        self, rows: Float[Array, "stack time key"], columns: Float[Array, "time key"]
    ) -> Float[Array, "stack time time"]:
        r"""Return $\sum_i \mathrm{rows}_{ti} \Phi_i(t,s)\, \mathrm{columns}_{si}$, s <= t, else 0.

        Matrix products across blocks, pair by pair inside them.
        """
        count, inner, _ = self.rows.shape
        stack, time, width = rows.shape
        rows = rows.reshape(stack, count, inner, width)
        columns = columns.reshape(count, inner, width)
        later = jnp.einsum("nbtk,bcsk->nbtcs", rows * self.rows, self.columns * columns)
        inside = jnp.einsum("nbtk,btsk->nbts", rows, self.within * columns[:, None])
        diagonal = jnp.eye(count, dtype=bool)[:, None, :, None]
        return jnp.where(diagonal, inside[:, :, :, None], later).reshape(stack, time, time)


class Span(eqx.Module):
    """Decay products of one chunk; `width` is 1 for scalar decay, else the key width.

    Args:
        since_start: Φ from where the token's document, or the chunk, starts; its own decay included.
        until_end: Φ(end, t); zero for tokens of a document that ends inside the chunk.
        between: Φ(t, s) for s <= t, else 0; scalar decay only.
        blocks: what stands for `between` where every key has its own decay.
        run: number of document starts in the chunk up to each token; None: nothing is packed.
    """

    since_start: Float[Array, "time width"]
    until_end: Float[Array, "time width"]
    between: Float[Array, "time time"] | None
    blocks: Blocks | None
    run: Int[Array, " time"] | None

    def scores(
        self, rows: Float[Array, "stack time key"], columns: Float[Array, "time key"]
    ) -> Float[Array, "stack time time"]:
        """As `Blocks.scores`."""
        if self.blocks is not None:
            return self.blocks.scores(rows, columns)
        return (rows @ columns.T) * self.between

    @property
    def carried(self) -> Bool[Array, " time"] | None:
        """Which tokens belong to the document the chunk starts with; None: all."""
        return None if self.run is None else self.run == 0

    @property
    def last(self) -> Bool[Array, " time"] | None:
        """Which tokens belong to the document the chunk ends with; None: all."""
        return None if self.run is None else self.run == self.run[-1]

    @property
    def together(self) -> Bool[Array, "time time"] | None:
        """Which pairs of tokens belong to one document; None: all."""
        return None if self.run is None else self.run[:, None] == self.run[None, :]


def span(decay: Float[Array, "time width"], reset: Bool[Array, " time"] | None) -> Span:
    """Form the decay products of one chunk; `reset` marks tokens that start a document."""
    crossing = decay if reset is None else jnp.where(reset[:, None], 0, decay)
    blocks = _blocks(crossing)
    between = None
    if decay.shape[1] == 1:
        ones = jnp.ones_like(decay)
        between, blocks = blocks.scores(ones[None], ones)[0], None
    run = None if reset is None else jnp.cumsum(reset.astype(jnp.int32))
    return Span(since_start(decay, reset), _until_end(crossing), between, blocks, run)


def since_start(
    decay: Float[Array, "time width"], reset: Bool[Array, " time"] | None
) -> Float[Array, "time width"]:
    """Multiply decays up to each token, anew from every reset."""
    if reset is None:
        return jnp.cumprod(decay, axis=0)

    def combine(left, right):
        product, started = left
        factor, starts = right
        return jnp.where(starts, factor, product * factor), started | starts

    return jax.lax.associative_scan(combine, (decay, reset[:, None]))[0]


def _until_end(crossing: Float[Array, "time width"]) -> Float[Array, "time width"]:
    following = jnp.concatenate([crossing[1:], jnp.ones_like(crossing[:1])])
    return jax.lax.cumprod(following, axis=0, reverse=True)


def _blocks(crossing: Float[Array, "time width"]) -> Blocks:
    time, width = crossing.shape
    inner = crossing.reshape(time // BLOCK, BLOCK, width)
    within = jax.vmap(_pairwise)(inner)
    rows = within[:, :, 0] * inner[:, :1]
    # Whole blocks between that of s and that of t: those after s's, before t's.
    whole = _pairwise(rows[:, -1])
    skipped = jnp.concatenate([jnp.zeros_like(whole[:1]), whole[:-1]])
    columns = skipped[:, :, None] * within[None, :, -1]
    return Blocks(within, rows, columns)


def _pairwise(factors: Float[Array, "time width"]) -> Float[Array, "time time width"]:
    """Return the product over s < u <= t for s <= t, else 0."""
    time = jnp.arange(factors.shape[0])
    later = (time[:, None] > time[None, :])[:, :, None]
    products = jnp.cumprod(jnp.where(later, factors[:, None], 1), axis=0)
    return jnp.where((time[:, None] >= time[None, :])[:, :, None], products, 0)
