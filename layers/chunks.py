r"""Time cut into chunks, and decay within a chunk.

Within a chunk, α_t = Π a up to and including token t (from the chunk's start), and every quantity
needs ratios α_t/α_s for s ≤ t alone. Each is the exponential of the log decays between s and t,
summed for that pair: every ratio is at most 1, so no decay is too strong, and no two sums are
subtracted, so a ratio of 1e-20 and its gradient keep their digits. One decay per key needs a ratio
per (t, s, key); blocks of 16 tokens are multiplied out, and pairs of blocks factor at the end of
the token's own block, the blocks between, and the start of the later block, all at most 1.

Documents start within chunks. A pair of tokens of two documents has weight 0; so has a token with
the state that entered the chunk, once a document has started.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .precision import exact_product

CHUNK, BLOCK = 64, 16

Rows = Float[Array, "chunk row"]
Pairs = Float[Array, "chunk chunk"]


class _Blocks(eqx.Module):
    """Ratios of a decay per key.

    Row block i reads column block j < i through the end of block i − 1.
    """

    inside: Float[Array, "block token token key"]  # α_t/α_s within a block
    before: Float[Array, "block block token key"]  # [i, j]: from a token of j to the end of i − 1
    after: Float[Array, "block token key"]  # from the end of the block before to a token

    def squared(self) -> "_Blocks":
        return jax.tree.map(jnp.square, self)


class Decay(eqx.Module):
    """Decay within one chunk.

    Args:
        steps: log a_t, (chunk, 1), or (chunk, key); None where nothing decays. A document's first
            token has 0: its own decay acts on the prior, not on what the chunk holds.
        document: how many documents have started up to and including each token; None where none
            ever does.
        shared: α_t/α_s where all keys share a decay.
        blocks: the same where each key has its own.
    """

    steps: Float[Array, "chunk width"] | None
    document: Int[Array, " chunk"] | None
    shared: Float[Array, "chunk chunk"] | None = None
    blocks: _Blocks | None = None


def within_chunk(
    log_decay: Float[Array, "chunk width"] | None, starts: Bool[Array, " chunk"] | None
) -> Decay:
    """A chunk's decays and documents."""
    document, steps = None, log_decay
    if starts is not None:
        document = jnp.cumsum(starts.astype(jnp.int32))
        steps = None if log_decay is None else jnp.where(starts[:, None], 0, log_decay)
    if steps is None:
        return Decay(None, document)
    if steps.shape[-1] > 1:
        return Decay(steps, document, blocks=_block_ratios(steps))
    return Decay(steps, document, shared=_shared_ratios(steps))


def _up_to(steps: Float[Array, "*block token width"]) -> Float[Array, "*block token width"]:
    """Sums over u ≤ t."""
    return exact_product(jnp.tril(jnp.ones((steps.shape[-2],) * 2, steps.dtype)), steps)


def _later(steps: Float[Array, "*block token width"]) -> Float[Array, "*block token width"]:
    """Sums over u > t."""
    return exact_product(jnp.triu(jnp.ones((steps.shape[-2],) * 2, steps.dtype), 1), steps)


def same_document(decay: Decay) -> Bool[Array, "chunk chunk"] | None:
    """Whether two tokens of a chunk belong to one document."""
    if decay.document is None:
        return None
    return decay.document[:, None] == decay.document[None, :]


def ratios(decay: Decay, like: Float[Array, "chunk row"]) -> Pairs:
    """α_t/α_s for s ≤ t of one document, else 0; of a decay that all keys share."""
    shared = decay.shared
    if shared is None:
        shared = jnp.tril(jnp.ones((len(like),) * 2, like.dtype))
    return within_documents(shared, decay)


def _shared_ratios(steps: Float[Array, "chunk 1"]) -> Pairs:
    chunk = len(steps)
    allowed = jnp.tril(jnp.ones((chunk, chunk), bool))
    between = _up_to(jnp.tril(jnp.broadcast_to(steps, (chunk, chunk)), -1))
    return jnp.exp(jnp.where(allowed, between, -jnp.inf))


def decayed_products(left: Rows, right: Rows, decay: Decay) -> Pairs:
    r"""$\sum_j l_{tj} r_{sj} \alpha_{tj}/\alpha_{sj}$ for s ≤ t, else 0."""
    if decay.blocks is None:
        return exact_product(left, right.T) * ratios(decay, left)
    ratio, chunk = decay.blocks, left.shape[0]
    left, right = _blocks(left), _blocks(right)
    blocks = len(left)
    diagonal = jnp.sum(left[:, :, None] * right[:, None] * ratio.inside, axis=-1)
    columns = (right[None] * ratio.before).reshape(blocks, chunk, -1)
    across = exact_product(left * ratio.after, columns.mT)
    across = across.reshape(blocks, BLOCK, blocks, BLOCK)
    return within_documents(_assemble(diagonal, across), decay)


def decayed_sums(weights: Pairs, rows: Rows, decay: Decay) -> Rows:
    r"""$\sum_{s \le t} w_{ts}\, r_{sj}\, \alpha_{tj}/\alpha_{sj}$, for lower-triangular weights."""
    if decay.blocks is None:
        return exact_product(weights * ratios(decay, rows), rows)
    return _block_sums(within_documents(weights, decay), rows, decay.blocks)


def _block_sums(weights: Pairs, rows: Rows, ratio: _Blocks) -> Rows:
    chunk = rows.shape[0]
    rows = _blocks(rows)
    blocks = len(rows)
    tiles = weights.reshape(blocks, BLOCK, blocks, BLOCK).transpose(0, 2, 1, 3)
    own = tiles[jnp.arange(blocks), jnp.arange(blocks)]
    diagonal = jnp.sum(own[..., None] * rows[:, None] * ratio.inside, axis=2)
    below = jnp.tril(jnp.ones((blocks, blocks), rows.dtype), -1)[:, :, None, None]
    left = (tiles * below).transpose(0, 2, 1, 3).reshape(blocks, BLOCK, chunk)
    right = (rows[None] * ratio.before).reshape(blocks, chunk, -1)
    return (diagonal + ratio.after * exact_product(left, right)).reshape(chunk, -1)


def _blocks(rows: Rows) -> Float[Array, "block token row"]:
    return rows.reshape(-1, BLOCK, rows.shape[-1])


def _block_ratios(steps: Float[Array, "chunk key"]) -> _Blocks:
    steps = _blocks(steps)
    blocks, width = len(steps), steps.shape[-1]
    later = jnp.tril(jnp.ones((BLOCK, BLOCK), bool), -1)[None, :, :, None]
    # [block, u, s, key]: the steps after s, summed over u ≤ t.
    after_column = jnp.where(later, steps[:, :, None], 0).reshape(blocks, BLOCK, -1)
    between = _up_to(after_column).reshape(blocks, BLOCK, BLOCK, width)
    causal = jnp.tril(jnp.ones((BLOCK, BLOCK), bool))[None, :, :, None]
    inside = jnp.exp(jnp.where(causal, between, -jnp.inf))
    row, column, block = jnp.ogrid[:blocks, :blocks, :blocks]
    skipped = ((column < block) & (block < row)).astype(steps.dtype)
    gaps = exact_product(skipped, steps.sum(axis=1))
    below = jnp.tril(jnp.ones((blocks, blocks), bool), -1)[:, :, None, None]
    before = jnp.exp(jnp.where(below, _later(steps)[None] + gaps[:, :, None], -jnp.inf))
    return _Blocks(inside, before, jnp.exp(_up_to(steps)))


def _assemble(diagonal: Array, across: Array) -> Pairs:
    """Tiles (block, token, block, token) with their diagonal tiles given apart."""
    blocks = len(diagonal)
    own = jnp.eye(blocks, dtype=bool)[:, None, :, None]
    tiles = jnp.where(own, diagonal[:, :, None, :], across)
    return tiles.reshape(blocks * BLOCK, blocks * BLOCK)


def within_documents(pairs: Pairs, decay: Decay) -> Pairs:
    """Pairs of tokens of one document; else 0."""
    same = same_document(decay)
    return pairs if same is None else jnp.where(same, pairs, 0)


def since_start(rows: Rows, decay: Decay) -> Rows:
    """Rows times α_t, counted from the start of each token's own document, or of the chunk."""
    if decay.steps is None:
        return rows
    earlier = jnp.tril(jnp.ones((len(rows),) * 2, rows.dtype))
    return rows * jnp.exp(exact_product(within_documents(earlier, decay), decay.steps))


def from_start(rows: Rows, decay: Decay) -> Rows:
    """Rows times α_t: what each token sees of the state that entered the chunk."""
    rows = since_start(rows, decay)
    if decay.document is not None:
        rows = jnp.where(decay.document[:, None] == 0, rows, 0)
    return rows


def last_document(decay: Decay) -> Decay:
    """The chunk's last document alone, as if the chunk began with its first token.

    Rows of earlier documents keep their place; `to_end` gives them weight 0.
    """
    if decay.document is None:
        return decay
    last = decay.document == decay.document[-1]
    steps = None if decay.steps is None else jnp.where(last[:, None], decay.steps, 0)
    return Decay(steps, (~last).astype(jnp.int32))


def to_end(rows: Rows, decay: Decay) -> Rows:
    """Rows times α_C/α_t: what is left of each token at the chunk's end."""
    if decay.steps is not None:
        rows = rows * jnp.exp(_later(decay.steps))
    if decay.document is not None:
        rows = jnp.where(decay.document[:, None] == decay.document[-1], rows, 0)
    return rows


def whole(decay: Decay, like: Array) -> Float[Array, " width"]:
    """α_C, or 0 where a document has started: what is left of the entering state."""
    kept = jnp.ones((1,), like.dtype) if decay.steps is None else jnp.exp(decay.steps.sum(axis=0))
    if decay.document is not None:
        kept = jnp.where(decay.document[-1] == 0, kept, 0)
    return kept


def accumulated(
    drift: Float[Array, "chunk other_width"], decay: Decay
) -> Float[Array, "chunk broad"]:
    r"""Variance that drift has added since the chunk's start, $c_t = a_t^2 c_{t-1} + q_t$."""
    if decay.blocks is None:
        return exact_product(ratios(decay, drift) ** 2, drift)
    assert decay.steps is not None
    drift = jnp.broadcast_to(drift, decay.steps.shape)
    every = jnp.tril(jnp.ones((len(drift),) * 2, drift.dtype))
    return _block_sums(within_documents(every, decay), drift, decay.blocks.squared())


def chunk_length(time: int) -> int:
    """Tokens per chunk: 64, or fewer for a short sequence; a power of two."""
    length = BLOCK
    while length < min(time, CHUNK):
        length *= 2
    return length


def cut(array: Array, length: int, filler: float | int | bool = 0) -> Array:
    """(time, ...) as (chunk, token, ...), padded with `filler`."""
    time = array.shape[0]
    padding = [(0, -time % length)] + [(0, 0)] * (array.ndim - 1)
    padded = jnp.pad(array, padding, constant_values=filler)
    return padded.reshape(-1, length, *array.shape[1:])


def join(array: Array, time: int) -> Array:
    """The inverse of `cut`."""
    return array.reshape(-1, *array.shape[2:])[:time]
