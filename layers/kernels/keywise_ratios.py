r"""What has a ratio of decays for every pair of tokens and key, a chunk at a time.

Ratios are never kept, or found as exponentials: ρ_ts is a product of decays a, which goes on by
one factor a token. In `factors` a thread owns a token s and a quarter of its keys, and takes u_s
through the tokens that follow,

$$ p_t = a_t\circ p_{t-1},\; p_s = u_s,\quad L_{ts} = k_t\cdot p_t,\quad R_{ts} = x_t\cdot p_t. $$

**Bytes** a token, of `factors`: 2 kB read and 1.5 written.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .covariance import CHUNK, COVARIANCE_PIECES, WIDTH
from .matrices import PIECES, SHARES
from .mosaic import BLOCK, pieces
from .threads import Threads

Tokens = Float[Array, "row two time key"]
"""Keys and queries."""
Rows = Float[Array, "row time key"]

_QUARTERS = (4, CHUNK, WIDTH // 4)
"""A chunk's rows of keys; each half of a warpgroup takes a quarter of the keys through tokens."""


class Prepared(NamedTuple):
    """What a block's rates make of its tokens.

    Args:
        tokens: α∘k and α∘x, in pieces.
        rates: α, decay since the block's start, 0 once a document has started; and c∘k.
        end: decay to the block's end; 0 where a document starts between.
        joint: J, of each token with the 16 of its block.
        asked: J'.
        last: c at the block's end.
        unread: c·x².
    """

    tokens: Float[Array, "row two piece time key"]
    rates: Tokens
    end: Rows
    joint: Float[Array, "row time 16"]
    asked: Float[Array, "row time 16"]
    last: Float[Array, "row block key"]
    unread: Float[Array, "row time"]


def prepare(tokens: Tokens, decay: Rows, added: Rows, *, interpret: bool = False) -> Prepared:
    """Prepare blocks of 16 tokens for `keywise.filter_keywise`.

    Args:
        tokens: keys and queries.
        decay: a; 0 where a document starts.
        added: variance before the write: drift, or all of it where a document starts.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, _, time, width = tokens.shape
    f32 = jnp.float32
    out = {
        "tokens": ((rows, 2, COVARIANCE_PIECES, time, width), jnp.bfloat16),
        "rates": ((rows, 2, time, width), f32),
        "end": ((rows, time, width), f32),
        **dict.fromkeys(("joint", "asked"), ((rows, time, BLOCK), f32)),
        "last": ((rows, time // BLOCK, width), f32),
        "unread": ((rows, time), f32),
    }
    run = mosaic.kernel(
        _prepare,
        out,
        {"row": rows, "chunk": time // CHUNK},
        _scratch((2, 4, CHUNK, BLOCK), copies=12),
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    return Prepared(**run(tokens, decay, added))


def _scratch(sums, copies):
    quarters = mosaic.SMEM(_QUARTERS, jnp.float32)
    return {
        "tokens": mosaic.SMEM((2, *_QUARTERS), jnp.float32),
        "decays": quarters,
        "drawn": quarters,
        "sums": mosaic.SMEM(sums, jnp.float32),
        "arrived": mosaic.barrier(num_arrivals=copies),
        "met": mosaic.barrier(num_arrivals=SHARES),
    }


def _bring(own, arrived, *copies):
    """Copy a chunk's rows of keys, in quarters."""
    for source, target in copies:
        for quarter in range(4):
            columns = pl.ds(quarter * (WIDTH // 4), WIDTH // 4)
            mosaic.copy_in(source.at[own, columns], target.at[quarter], arrived)


def _each(source, target):
    """Keys' and queries' rows, and where they are copied to."""
    return [(source.at[n], target.at[n]) for n in range(2)]


def _prepare(tokens_in, decay_in, added_in, *, out, place, interpret):
    out = SimpleNamespace(**out)
    tokens, decays, drawn, sums, arrived, met = place.values()
    row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
    share = lax.axis_index("wg")
    thread = Threads(interpret)
    first = chunk * CHUNK
    own = pl.ds(first, CHUNK)
    mine = pl.ds(2 * share, 2)
    zero, one = thread.number(0.0), thread.number(1.0)
    unread = sums.at[0]  # until sums are found

    @pl.when(share == 0)
    def _():
        _bring(own, arrived, (decay_in.at[row], decays), *_each(tokens_in.at[row], tokens))

    mosaic.barrier_wait(arrived)

    @pl.when(share == 0)
    def _fade():
        def block(index, carry):
            group = [index * BLOCK + n for n in range(BLOCK)]
            added = [thread.row(added_in.at[row, first + t]) for t in group]
            alpha, drift = one, zero
            for t, more in zip(group, added, strict=True):
                decay = thread.row(decays.at[:, t])
                key, query = (thread.row(tokens.at[n, :, t]) for n in range(2))
                alpha, drift = alpha * decay, decay * decay * drift + more
                faded = pieces(alpha * thread.own(key, query), COVARIANCE_PIECES)
                for piece, part in enumerate(faded):
                    thread.put(out.tokens.at[row, :, piece, first + t], part)
                thread.put(out.rates.at[row, :, first + t], thread.own(alpha, drift * key))
                thread.put_row(drawn.at[:, t], drift * key)
                thread.put_row(unread.at[:, t], drift * query * query)
            thread.put_row(out.last.at[row, chunk * (CHUNK // BLOCK) + index], drift)
            return carry

        lax.fori_loop(0, CHUNK // BLOCK, block, None)

    @pl.when(share == 1)
    def _end():
        def block(index, carry):
            end = one
            for n in reversed(range(BLOCK)):
                t = index * BLOCK + n
                thread.put_row(out.end.at[row, first + t], end)
                end = end * thread.row(decays.at[:, t])
            return carry

        lax.fori_loop(0, CHUNK // BLOCK, block, None)

    mosaic.meet(met, interpret)

    @pl.when(share == 0)
    def _leave_unread():
        every = (mosaic.load(unread.at[quarter]) for quarter in range(4))
        out.unread.at[row, own][...] = jnp.sum(_sum(every), axis=1)

    mosaic.meet(met, interpret)
    place = thread.index % BLOCK

    def token(n, taken):
        def entries(ref):
            return thread.spread_blocks(ref.at[mine], n)

        taken = _taken(place == jnp.int32(n), taken, entries(decays), entries(drawn))
        for which in range(2):
            product = _product(taken, entries(tokens.at[which]))
            thread.put_blocks(sums.at[which, mine], n, product)
        return taken

    lax.fori_loop(0, BLOCK, token, (zero,) * (WIDTH // 4))
    mosaic.meet(met, interpret)
    found = _sum(mosaic.load(sums.at[share, quarter]) for quarter in range(4))
    for which, ref in enumerate((out.joint, out.asked)):

        @pl.when(share == which)
        def _(ref=ref):
            ref.at[row, own][...] = found


def _taken(entering, taken, decays, entries):
    """A quarter of u of each thread's token, one token on, which is where u enters."""
    parts = zip(taken, decays, entries, strict=True)
    return tuple(jnp.where(entering, new, decay * old) for old, decay, new in parts)


def _product(left, right):
    """A sum of products, as four: one alone would be waited for."""
    terms = [one * other for one, other in zip(left[:4], right[:4], strict=True)]
    for n, (one, other) in enumerate(zip(left[4:], right[4:], strict=True)):
        terms[n % 4] = terms[n % 4] + one * other
    return _sum(terms)


def _sum(four):
    a, b, c, d = four
    return (a + b) + (c + d)


def factors(
    tokens: Tokens, decay: Rows, whitened: Float[Array, "row time both"], *, interpret: bool = False
) -> tuple[Array, ...]:
    """What chunks are made of, given what the forward pass has left.

    Args:
        tokens: keys and queries.
        decay: a; 0 where a document starts.
        whitened: u and w.
        interpret: whether to run the kernel's simulation on a CPU.

    Returns:
        L and R (row, chunk, 2, 64, 64); k̃ and x̃ in pieces (row, 2, piece, time, key); ε∘u and w
        (row, time, 128); α_C (row, chunk, 2, key), twice.
    """
    rows, _, time, width = tokens.shape
    chunks, f32 = time // CHUNK, jnp.float32
    out = {
        "factors": ((rows, chunks, 2, CHUNK, CHUNK), f32),
        "faded": ((rows, 2, PIECES, time, width), jnp.bfloat16),
        "moved": ((rows, time, width + WIDTH), f32),
        "kept": ((rows, chunks, 2, width), f32),
    }
    run = mosaic.kernel(
        _factors,
        out,
        {"row": rows, "chunk": chunks},
        _scratch((2, 4, BLOCK, CHUNK), copies=20),
        SHARES,
        interpret,
        reduction_bytes=0,
    )
    return tuple(run(tokens, decay, whitened).values())


def _factors(tokens_in, decay_in, whitened_in, *, out, place, interpret):
    out = SimpleNamespace(**out)
    tokens, decays, drawn, sums, arrived, met = place.values()
    row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
    share = lax.axis_index("wg")
    thread = Threads(interpret)
    first, mine = chunk * CHUNK, pl.ds(2 * share, 2)
    surprises = sums.at[1]  # until sums are found

    @pl.when(share == 0)
    def _():
        rates = (decay_in.at[row], decays), (whitened_in.at[row], drawn)
        _bring(pl.ds(first, CHUNK), arrived, *rates, *_each(tokens_in.at[row], tokens))
        for block in range(CHUNK // BLOCK):
            rows = pl.ds(first + block * BLOCK, BLOCK)
            source = whitened_in.at[row, rows, pl.ds(WIDTH, WIDTH)]
            mosaic.copy_in(source, surprises.at[block], arrived)

    one = thread.number(1.0)
    mosaic.barrier_wait(arrived)

    @pl.when(share == 0)
    def _fade():
        def token(t, alpha):
            alpha = alpha * thread.row(decays.at[:, t])
            faded = thread.own(*(thread.row(tokens.at[n, :, t]) for n in range(2)))
            for piece, part in enumerate(pieces(alpha * faded, PIECES)):
                thread.put(out.faded.at[row, :, piece, first + t], part)
            return alpha

        thread.put(out.kept.at[row, chunk], lax.fori_loop(0, CHUNK, token, one))

    @pl.when(share == 1)
    def _move():
        def token(step, end):
            t = CHUNK - 1 - step
            surprise = thread.row(surprises.at[t // BLOCK, lax.rem(t, BLOCK)])
            moved = thread.own(end * thread.row(drawn.at[:, t]), surprise)
            out.moved.at[row, first + t][...] = moved
            return end * thread.row(decays.at[:, t])

        lax.fori_loop(0, CHUNK, token, one)

    place = thread.index % CHUNK

    def block(index, taken):
        start = index * BLOCK
        mosaic.meet(met, interpret)

        def token(n, taken):
            def entries(ref):
                return thread.spread(ref.at[mine, start + n])

            taken = _taken(place == jnp.int32(start + n), taken, entries(decays), entries(drawn))
            for which in range(2):
                product = _product(taken, entries(tokens.at[which]))
                thread.put(sums.at[which, mine, n], product)
            return taken

        taken = lax.fori_loop(0, BLOCK, token, taken)
        mosaic.meet(met, interpret)

        def leave(step, carry):
            two = pl.ds(2 * step, 2)
            found = _sum(thread.halves(sums.at[share, quarter, two]) for quarter in range(4))
            thread.put(out.factors.at[row, chunk, share, pl.ds(start + 2 * step, 2)], found)
            return carry

        lax.fori_loop(0, BLOCK // 2, leave, None)
        return taken

    lax.fori_loop(0, CHUNK // BLOCK, block, (thread.number(0.0),) * (WIDTH // 4))
