"""A block's part in the covariance (`kernels.forward`), for the warpgroups that hold P.

`here` names what lies in shared memory. One warpgroup holds all of P for keys of 64
(`narrow_block`), and two hold 64 rows each for keys of 128 (`wide_block`).
"""

from functools import partial, reduce
from operator import add
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import elimination, mosaic
from .mosaic import BLOCK, COLUMNS, along_columns, pairs, pieces

WIDTH = 64
"""Values of a program, and keys of a warpgroup that holds rows of P."""
CHUNK = 64
"""Tokens that are copied together, and between saved states."""
TILE = 64
"""Columns of a state that are split together, where it takes 64 registers a thread."""
COVARIANCE_PIECES = 3


def pieces_of(ref, slot, tokens=None, columns: Any = slice(None)):
    """Pieces of a chunk's keys or queries; or of a block's, upright."""
    every = range(ref.shape[1])
    if tokens is None:
        return [ref.at[slot, piece] for piece in every]
    return [ref.at[slot, piece, tokens, columns].transpose((1, 0)) for piece in every]


def tiles_of(width):
    """Columns of the tiles in which states are held, and split."""
    tile = WIDTH if width == WIDTH else TILE
    return [pl.ds(first, tile) for first in range(0, width, tile)]


def through(state, here, slot, tokens, count):
    """A state's products with a block's keys and queries, split a tile at a time."""
    multiply = partial(mosaic.product, (WIDTH, BLOCK), interpret=here.interpret)
    products = []
    for tile, columns in zip(state, tiles_of(here.keys.shape[-1]), strict=True):
        split = pieces(tile, count)
        operands = (pieces_of(ref, slot, tokens, columns) for ref in (here.keys, here.queries))
        products.append([multiply(pairs(split, right, count)) for right in operands])
    return [reduce(add, parts) for parts in zip(*products, strict=True)]


def fetch(here, sources, places, row, chunk, slot):
    """Start to copy a chunk's tokens to shared memory; `full` says when they are there."""
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    for source, target in zip(sources, places, strict=True):
        if len(source.shape) == 4:
            every = range(source.shape[1])
            copies = [(source.at[row, p, tokens], target.at[slot, p]) for p in every]
        else:
            copies = [(source.at[row, tokens], target.at[slot])]
        for part, place in copies:
            mosaic.copy_in(part, place, here.full.at[slot])


def identity(size=WIDTH):
    shape = size, size
    diagonal = mosaic.index(shape, 0) == mosaic.index(shape, 1)
    return jnp.where(diagonal, jnp.float32(1), jnp.float32(0))


def hidden_zero(here, slot, start):
    """0, which the compiler cannot know.

    What is indexed by it is found in each block: otherwise operands' descriptors are computed
    before the loop over blocks, more of them than there are registers.
    """
    return jnp.where(here.alphas[slot, start + BLOCK - 1] < 0, 1, 0)


def since(here, slot, start):
    """Decay of P since the block's start, of each token."""
    tokens = pl.ds(start, BLOCK)
    alpha = mosaic.load(here.alphas.at[slot, tokens], COLUMNS)
    if here.faded is None:
        return alpha * alpha
    return alpha * alpha * jnp.exp(mosaic.load(here.faded.at[slot, tokens], COLUMNS))


def until(here, slot, start):
    """Decay of P from each token to the block's end."""
    tokens = pl.ds(start, BLOCK)
    end = mosaic.load(here.ends.at[slot, tokens], COLUMNS)
    if here.faded is None:
        return end * end
    faded = mosaic.load(here.faded.at[slot, tokens], COLUMNS)
    return end * end * jnp.exp(here.faded[slot, start + BLOCK - 1] - faded)


def through_all(here, slot, start):
    """Decay of P through the block."""
    last = start + BLOCK - 1
    kept = here.alphas[slot, last] ** 2
    return kept if here.faded is None else kept * jnp.exp(here.faded[slot, last])


def across(ref, count, columns):
    """The first pieces of what is written (key, token) as (token, key), of these keys."""
    return [ref.at[piece, columns].transpose((1, 0)) for piece in range(count)]


def _eliminate(here, share, slot, tokens, joint=None):
    elimination.eliminate(
        here.joint.at[share if joint is None else joint, tokens],
        here.noises.at[slot, tokens],
        here.decays.at[slot, tokens],
        here.columns,
        here.whitened,
        here.deviations.at[share, tokens],
        keys=here.keys.shape[-1],
        kept=None if here.kept is None else here.kept.at[slot, tokens],
        interpret=here.interpret,
    )


def turn(start):
    """Which of two places a block uses; its neighbours use the other."""
    return lax.rem(lax.div(start, BLOCK), 2)


def narrow_block(reads=True):
    """A block of 64-wide keys, for the one warpgroup that holds P.

    Args:
        reads: whether queries are read; else another warpgroup eliminates beside this one, from
            two joint covariances in turn (`kernels.elements`).
    """
    thin, square = (WIDTH, BLOCK), (WIDTH, WIDTH)
    spread = identity()

    def block(here, slot, start, covariances):
        (covariance,) = covariances
        beside = partial(mosaic.product_beside, interpret=here.interpret)
        tokens = pl.ds(start, BLOCK)
        split = pieces(covariance, COVARIANCE_PIECES)
        fade = since(here, slot, start)
        drift = along_columns(mosaic.load(here.drifts.at[slot, tokens], COLUMNS), thin)
        carried, drifted = beside(
            thin,
            pairs(split, pieces_of(here.keys, slot, tokens), 3),
            lambda: mosaic.load_transposed(here.keys_plain.at[slot, tokens]) * drift,
        )

        def tie():
            tied = carried * along_columns(fade, thin) + drifted
            mosaic.store_transposed(here.columns.at[:, pl.ds(0, WIDTH)], tied)
            for piece, part in enumerate(pieces(tied, COVARIANCE_PIECES)):
                here.drawn.at[0, piece][...] = part
            mosaic.commit_smem()

        seen = None
        if reads:
            terms = pairs(split, pieces_of(here.queries, slot, tokens), 3)
            seen, _ = beside(thin, terms, tie)
        else:
            tie()
        drawn_pieces = [here.drawn.at[0, piece] for piece in range(COVARIANCE_PIECES)]

        def ready():
            mosaic.barrier_wait(here.innovations_ready)
            return mosaic.load(here.ratios.at[slot])

        between, ratios = beside(
            (CHUNK, BLOCK), pairs(pieces_of(here.keys, slot), drawn_pieces, 3), ready
        )
        place = 0 if reads else turn(start)
        here.joint.at[place, :, pl.ds(0, BLOCK)][...] = between * ratios
        if not reads:
            mosaic.barrier_arrive(here.joint_ready)
        ending = along_columns(until(here, slot, start), thin)
        kept = through_all(here, slot, start)
        added = here.drifts[slot, start + BLOCK - 1]
        _eliminate(here, 0, slot, tokens, place)
        own = mosaic.load_transposed(here.whitened.at[:, pl.ds(0, WIDTH)])
        for piece, part in enumerate(pieces(own, COVARIANCE_PIECES)):
            here.moved.at[0, piece][...] = part
        mosaic.commit_smem()
        mosaic.barrier_arrive(here.elimination_ready)
        left = pieces(own * ending, COVARIANCE_PIECES)
        right = across(here.moved.at[0], COVARIANCE_PIECES, pl.ds(0, WIDTH))

        def fade_and_read():
            if seen is not None:
                read = seen * mosaic.load_transposed(here.queries_plain.at[slot, tokens])
                mosaic.store_transposed(here.read.at[tokens, pl.ds(0, WIDTH)], read)
            return covariance * kept + spread * added

        absorbed, faded = beside(square, pairs(left, right, 3), fade_and_read)
        return (faded - absorbed,)

    return block


def wide_block(share, here, slot, start, covariance):
    """A block of wider keys, for each warpgroup that holds 64 rows of P.

    Covariances are split a tile at a time and indices found anew in every block, for registers.
    """
    thin = WIDTH, BLOCK
    multiply = partial(mosaic.product, interpret=here.interpret)
    tokens, own = pl.ds(start, BLOCK), pl.ds(share * WIDTH, WIDTH)
    tiles = tiles_of(here.keys.shape[-1])
    only = hidden_zero(here, slot, start)
    drawn, moved = here.drawn.at[only], here.moved.at[only]

    def upright(ref):
        parts = [ref.at[slot, piece, tokens, own] for piece in range(ref.shape[1])]
        return reduce(add, map(mosaic.load_transposed, parts))

    carried, seen = through(covariance, here, slot, tokens, COVARIANCE_PIECES)
    fade = along_columns(since(here, slot, start), thin)
    drift = along_columns(mosaic.load(here.drifts.at[slot, tokens], COLUMNS), thin)
    tied = carried * fade + upright(here.keys) * drift
    mosaic.store_transposed(here.columns.at[:, own], tied)
    for piece, part in enumerate(pieces(tied, COVARIANCE_PIECES)):
        drawn.at[piece, own][...] = part
    mosaic.commit_smem()
    mosaic.barrier_arrive(here.drawn_ready)
    query = upright(here.queries)
    seen = (seen * fade + query * drift) * query
    mosaic.barrier_wait(here.drawn_ready)
    drawn_pieces = [drawn.at[piece] for piece in range(COVARIANCE_PIECES)]
    between = multiply((CHUNK, BLOCK), pairs(pieces_of(here.keys, slot + only), drawn_pieces, 3))
    here.joint.at[share, :, pl.ds(0, BLOCK)][...] = between * mosaic.load(here.ratios.at[slot])
    mosaic.barrier_wait(here.innovations_ready)
    mosaic.store_transposed(here.read.at[tokens, own], seen)
    _eliminate(here, share, slot, tokens)
    whitened = mosaic.load_transposed(here.whitened.at[:, own])
    for piece, part in enumerate(pieces(whitened, COVARIANCE_PIECES)):
        moved.at[piece, own][...] = part
    mosaic.commit_smem()
    mosaic.barrier_arrive(here.elimination_ready)
    left = pieces(whitened * along_columns(until(here, slot, start), thin), COVARIANCE_PIECES)
    kept = through_all(here, slot, start)
    added = here.drifts[slot, start + BLOCK - 1]
    mosaic.barrier_wait(here.elimination_ready)
    after = []
    for tile, columns in zip(covariance, tiles, strict=True):
        right = across(moved, COVARIANCE_PIECES, columns)
        absorbed = multiply(tile.shape, pairs(left, right, 3))
        row = mosaic.index(tile.shape, 0) + (share * WIDTH - columns.start + only)
        drifted = jnp.where(row == mosaic.index(tile.shape, 1), added, jnp.float32(0))
        after.append(tile * kept + drifted - absorbed)
    return tuple(after)
