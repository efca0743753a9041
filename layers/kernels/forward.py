r"""The exact filter in blocks of 16 tokens on the tensor cores, one program a head.

A block starts from P and M; α_t is the decay since its start, ρ_ts that between two of its tokens
(s ≤ t), ε_s that to its end, and c_t the variance added since its start. With

$$ e_s = \alpha_s^2 P k_s + c_s k_s,\quad G_{ts} = \rho_{ts}\, k_t^\top e_s,\quad
   G + \mathrm{diag}(r) = L L^\top $$

elimination gives the whitened covariances u of the block's values with the memory, each at its own
time, and W = L⁻¹(V − α K Mᵀ), the whitened innovations (`elimination.eliminate`). Then

$$ X_{ts} = \rho_{ts}\, x_t^\top u_s,\quad y_t = \alpha_t M x_t + \sum_s X_{ts} w_s,\quad
   \mathrm{var}_t = \alpha_t^2 x_t^\top P x_t + c_t |x_t|^2 - \sum_s X_{ts}^2 $$

$$ M \leftarrow \alpha_{16} M + \sum_s \epsilon_s w_s u_s^\top,\quad
   P \leftarrow \alpha_{16}^2 P + c_{16} I - \sum_s \epsilon_s^2 u_s u_s^\top $$

Every ratio is at most 1, so no decay is too strong, and 0 where a document starts between.

Where a restoration keeps λ of the predicted covariance, α, ε and ρ are the mean's. P's are these
with √δ besides, δ_ts = λ_{s+1}⋯λ_t: α²δ in e and in P, X∘X∘δ in the variances, ε²δ in P; and L is
kept in the mean's decay (`elimination.eliminate`). So λ may be 0, though its powers are divided by
in the usual form of two decays.

**Layout.** Warpgroup 0 holds P (64 × 64 float32) in registers, warpgroup 1 holds M; both are split
into bfloat16 pieces (`mosaic.pieces`), three for P and two for M, as left operands of the tensor
cores. Warpgroup 0's tensor cores find P x for the variances while it leaves e. Sums are float32.
Where shared memory holds two places of what consecutive blocks use (bfloat16 inputs), warpgroup 1
leaves a block's innovations as soon as M is updated, and finds what the block before has read
while warpgroup 0 eliminates. It also starts the copies of the chunks to come.

Keys of 128 take one warpgroup more: warpgroups 0 and 1 hold 64 rows of P each, and whiten their own
64 columns of E, each from its own factorisation of the same G. A warpgroup's states are tiles of
64 × 64, split one at a time, P k and P x from the same pieces: three warpgroups have 168 registers
a thread, of which a state takes 64.

**Bytes** a token of bfloat16 inputs, 64 wide: 640 read for keys and queries (twice each, in two
forms of shared memory) and values, 84 for rates; 256 written for the mean, 512 for what is
whitened, 8 for variances, 512 for the states that a backward pass starts from. At 128 wide keys and
queries are read once, in one form: 640, 84; 256, 768, 8 and 1536.
"""

from functools import partial, reduce
from operator import add
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .blocks import Rates
from .covariance import (
    CHUNK,
    COVARIANCE_PIECES,
    WIDTH,
    across,
    fetch,
    hidden_zero,
    narrow_block,
    pieces_of,
    through,
    tiles_of,
    turn,
    wide_block,
)
from .mosaic import BLOCK, COLUMNS, ROWS, along_columns, along_rows, pairs, pieces

MEAN_PIECES, SAVED_PIECES = 2, 2
QUERY_PIECES = 2
"""Of float32 queries that are 128 wide: what is said is then of queries 2⁻¹⁷ away."""

Keys = Float[Array, "row time key"]
Numbers = Float[Array, "row time"]


def filter_blocks(
    key: Keys,
    value: Float[Array, "row time value"],
    query: Keys,
    rates: Rates,
    covariance: Float[Array, "row key key"],
    mean: Float[Array, "row value key"],
    *,
    save: bool,
    interpret: bool = False,
) -> dict[str, Array]:
    """Filter rows of 64 values and 64 or 128 keys; time is a multiple of 64.

    Args:
        key: bfloat16 or float32, as are values and queries.
        value: what is written.
        query: what is read.
        rates: of every token.
        covariance: P before the first token.
        mean: M before the first token.
        save: whether the states at every 64th token are wanted.
        interpret: whether to run the kernel's simulation on a CPU.

    Returns:
        `mean` (row, time, 64), `variance` and `inverse_deviation` (row, time), `whitened`
        (row, time, key + 64) which holds u and then w, `last_covariance`, `last_mean`, and where
        saved `covariances` and `means` in bfloat16 pieces (row, chunk, piece, 64 or key, key).
    """
    rows, time, width = key.shape
    shares = width // WIDTH
    exact = key.dtype == jnp.bfloat16
    depth = 1 if exact else COVARIANCE_PIECES
    chunks = time // CHUNK
    slots = min(2, chunks) if exact else 1
    ahead = shares == 1 and slots > 1
    turns = 2 if ahead else 1
    spare = 4 if shares == 1 else 0  # columns that keep rows in banks apart, where there is room
    f32 = jnp.float32
    out = {
        "mean": ((rows, time, WIDTH), f32),
        "variance": ((rows, time), f32),
        "inverse_deviation": ((rows, time), f32),
        "whitened": ((rows, time, width + WIDTH), f32),
        "last_covariance": ((rows, width, width), f32),
        "last_mean": ((rows, WIDTH, width), f32),
    }
    if save:
        states = rows, chunks, SAVED_PIECES
        out["covariances"] = ((*states, width, width), jnp.bfloat16)
        out["means"] = ((*states, WIDTH, width), jnp.bfloat16)
    shared = mosaic.SMEM
    plain = shared((slots, CHUNK, WIDTH), key.dtype)
    numbers = shared((slots, CHUNK), f32)
    columns = BLOCK, width + WIDTH + 4

    def pieced(count, rows, places=1):
        return shared((places, count, rows, BLOCK), jnp.bfloat16, transforms=mosaic.THIN)

    def operands(array, depth):
        shape = slots, depth, CHUNK, width
        return split(array, depth), shared(shape, jnp.bfloat16, transforms=mosaic.THIN)

    tokens = {
        "keys": operands(key, depth),
        "keys_plain": (key, plain),
        "queries": operands(query, depth if shares == 1 else min(depth, QUERY_PIECES)),
        "queries_plain": (query, plain),
        "values": (value, plain),
    }
    if shares > 1:  # their pieces are read instead: there is no room for both
        del tokens["keys_plain"], tokens["queries_plain"]
    scratch = {name: place for name, (_, place) in tokens.items()} | {
        **dict.fromkeys(("noises", "alphas", "drifts", "ends", "decays"), numbers),
        "ratios": shared((slots, CHUNK, BLOCK), f32),
    }
    if rates.kept is not None:
        scratch |= {"kept": numbers, "faded": numbers}
    scratch |= {
        "outputs": shared((CHUNK, WIDTH), f32),
        "read": shared((turns, CHUNK, width + 4), f32),
        "variances": shared((CHUNK,), f32),
        "deviations": shared((turns, shares, CHUNK), f32),
        "columns": shared(columns, f32),
        "whitened": shared((turns, *columns), f32),
        "joint": shared((shares, CHUNK, BLOCK + spare), f32),
        "drawn": pieced(COVARIANCE_PIECES, width),
        "moved": pieced(COVARIANCE_PIECES, width, turns),
        "explained": pieced(MEAN_PIECES, CHUNK),
    }
    if save and shares == 1:  # of P alone: for M, which waits for P, there is no room
        scratch["state"] = shared(
            (SAVED_PIECES, WIDTH, WIDTH), jnp.bfloat16, transforms=mosaic.operands_of(WIDTH)
        )
    given = rates.given()
    sources = *(array for array, _ in tokens.values()), *given
    copies = sum(x.shape[1] if x.ndim == 4 else 1 for x in sources[: len(tokens)]) + len(given)
    scratch |= {
        "full": mosaic.barrier(num_arrivals=copies, num_barriers=slots),
        "free": mosaic.barrier(num_arrivals=shares, num_barriers=slots),
        "innovations_ready": mosaic.barrier(num_arrivals=1),
        "elimination_ready": mosaic.barrier(num_arrivals=shares),
    }
    if shares > 1:
        scratch["drawn_ready"] = mosaic.barrier(num_arrivals=shares)
    run = mosaic.kernel(
        partial(_body, chunks=chunks, slots=slots, ahead=ahead, save=save),
        out,
        {"row": rows},
        scratch,
        shares + 1,
        interpret,
    )
    return run(*sources, covariance, mean)


def split(rows: Keys, depth: int) -> Float[Array, "row piece time width"]:
    """Bfloat16 pieces of rows, which sum to them but for what `depth` pieces cannot hold."""
    if depth == 1:
        return rows[:, None]
    out, rest = [], rows
    for _ in range(depth):
        rounded = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        out.append(rounded.astype(jnp.bfloat16))
        rest = rest - rounded
    return jnp.stack(out, axis=1)


def _body(*inputs, out, place, chunks, slots, ahead, save, interpret):
    *sources, covariance_in, mean_in = inputs
    targets = tuple(place.values())[: len(sources)]
    here = SimpleNamespace(**{"kept": None, "faded": None} | place, interpret=interpret)
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    width = here.keys.shape[-1]
    shares = width // WIDTH
    blocks = CHUNK // BLOCK
    thin = WIDTH, BLOCK
    multiply = partial(mosaic.product, interpret=interpret)
    load = mosaic.load
    tiles = tiles_of(width)

    def in_turn(slot, start):
        """What lies in shared memory, by name, where a block and its chunk have it."""
        block, chunk = (turn(start), slot) if ahead else (0, 0)
        own = {
            "whitened": here.whitened.at[block],
            "moved": here.moved.at[pl.ds(block, 1)],
            "read": here.read.at[chunk],
            "deviations": here.deviations.at[chunk],
        }
        return SimpleNamespace(**vars(here) | own)

    def leave(name, chunk, rows, state):
        for columns, tile in zip(tiles, state, strict=True):
            for piece, part in enumerate(pieces(tile, SAVED_PIECES)):
                out[name].at[row, chunk, piece, rows, columns][...] = part

    @pl.when(warpgroup < shares)
    def _covariance():
        share = warpgroup if shares > 1 else 0
        own = pl.ds(share * WIDTH, WIDTH)
        block = narrow_block() if shares == 1 else partial(wide_block, share)

        def copy_out(c, covariance):
            mosaic.wait_out(0, wait_read_only=True)
            split = pieces(covariance[0], SAVED_PIECES)
            for piece, part in enumerate(split):
                here.state.at[piece][...] = part
            mosaic.commit_smem()
            for piece in range(SAVED_PIECES):
                mosaic.copy_out(here.state.at[piece], out["covariances"].at[row, c, piece])

        def chunk(c, covariance):
            slot = lax.rem(c, slots)
            mosaic.barrier_wait(here.full.at[slot])
            if save and shares == 1:
                copy_out(c, covariance)
            elif save:
                leave("covariances", c, own, covariance)

            def through_block(i, covariance):
                return block(in_turn(slot, i * BLOCK), slot, i * BLOCK, covariance)

            covariance = lax.fori_loop(0, blocks, through_block, covariance)
            mosaic.barrier_arrive(here.free.at[slot])
            return covariance

        start = tuple(load(covariance_in.at[row, own, columns]) for columns in tiles)
        covariance = lax.fori_loop(0, chunks, chunk, start)
        if ahead:  # of a block after the last, which does not come
            mosaic.barrier_wait(here.innovations_ready)
        for columns, tile in zip(tiles, covariance, strict=True):
            out["last_covariance"].at[row, own, columns][...] = tile
        mosaic.wait_out(0)

    @pl.when(warpgroup == shares)
    def _mean():
        token = mosaic.index((CHUNK,), 0, ROWS)
        values_of = pl.ds(width, WIDTH)

        def bring(chunk, slot):
            fetch(here, sources, targets, row, chunk, slot)

        def bring_after(c):
            """What follows in the place of chunk c, once all have left it."""

            @pl.when(jnp.logical_and(c >= 0, c + slots < chunks))
            def _():
                mosaic.commit_smem()  # this warpgroup's own warps may be reading the chunk yet
                bring(c + slots, lax.rem(c, slots))

        def lasting(slot, tokens):
            """What restoration keeps of each of the block's tokens until the chunk's."""
            shape = CHUNK, BLOCK
            faded = along_rows(load(here.faded.at[slot], ROWS), shape)
            before = along_columns(load(here.faded.at[slot, tokens], COLUMNS), shape)
            return jnp.exp(jnp.minimum(faded - before, 0))

        def enter(mean, slot, start):
            """Leave a block's innovations, and return what its queries find before it."""
            tokens = pl.ds(start, BLOCK)
            alpha = along_columns(load(here.alphas.at[slot, tokens], COLUMNS), thin)
            split = pieces(mean[0], MEAN_PIECES)
            if shares > 1:
                expected, entered = through(mean, here, slot, tokens, MEAN_PIECES)
            else:  # innovations are waited for
                entered = None
                keys = pieces_of(here.keys, slot, tokens)
                expected = multiply(thin, pairs(split, keys, 2))
            innovation = mosaic.load_transposed(here.values.at[slot, tokens]) - expected * alpha
            mosaic.store_transposed(here.columns.at[:, values_of], innovation)
            mosaic.barrier_arrive(here.innovations_ready)
            if entered is None:
                queries = pieces_of(here.queries, slot, tokens)
                entered = multiply(thin, pairs(split, queries, 2))
            return entered * alpha

        def enter_next(c, i, mean):
            """`enter` the block after block i of chunk c, which may be the next chunk's."""
            after = lax.div(i + 1, blocks)
            slot = lax.rem(c + after, slots)

            @pl.when(jnp.logical_and(after > 0, c + after < chunks))
            def _():
                mosaic.barrier_wait(here.full.at[slot])

            return enter(mean, slot, lax.rem(i + 1, blocks) * BLOCK)

        def chunk(c, carry):
            slot = lax.rem(c, slots)
            if not ahead:
                mosaic.barrier_wait(here.full.at[slot])
            mosaic.wait_out(0, wait_read_only=True)
            if save:
                leave("means", c, pl.ds(0, WIDTH), carry[0])

            def block(i, carry):
                mean, entered, squares = carry
                start = i * BLOCK
                tokens = pl.ds(start, BLOCK)
                now = in_turn(slot, start)
                only = 0 if shares == 1 else hidden_zero(here, slot, start)
                written, explained = now.moved.at[only], here.explained.at[only]
                if not ahead:
                    entered = enter(mean, slot, start)
                mosaic.barrier_wait(here.elimination_ready)
                surprise = mosaic.load_transposed(now.whitened.at[:, values_of])
                end = along_columns(load(here.ends.at[slot, tokens], COLUMNS), thin)
                left = pieces(surprise * end, MEAN_PIECES)
                kept = here.alphas[slot, start + BLOCK - 1]
                moved = []
                for tile, columns in zip(mean, tiles, strict=True):
                    right = across(written, MEAN_PIECES, columns)
                    moved.append(tile * kept + multiply(tile.shape, pairs(left, right, 2)))
                entered_next = enter_next(c, i, moved) if ahead else entered
                own = [written.at[piece] for piece in range(COVARIANCE_PIECES)]
                queries = pieces_of(here.queries, slot + only)

                def leave_whitened():
                    for first in range(0, width, WIDTH):
                        columns = pl.ds(first, 2 * WIDTH)
                        lines = [
                            mosaic.load_threads(now.whitened.at[t, columns]) for t in range(BLOCK)
                        ]
                        for t, line in enumerate(lines):
                            out["whitened"].at[row, c * CHUNK + start + t, columns][...] = line

                seen, _ = mosaic.product_beside(
                    (CHUNK, BLOCK), pairs(queries, own, 3), leave_whitened, interpret
                )
                seen = seen * load(here.ratios.at[slot])
                squared = seen * seen
                if here.faded is not None:
                    squared = squared * lasting(slot, tokens)
                own_squares = jnp.sum(squared, axis=1)
                within = jnp.logical_and(token >= start, token < start + BLOCK)
                squares = jnp.where(within, own_squares, squares)
                for piece, part in enumerate(pieces(seen, MEAN_PIECES)):
                    explained.at[piece][...] = part
                mosaic.commit_smem()
                weights = [explained.at[p, tokens].transpose((1, 0)) for p in range(MEAN_PIECES)]
                output = entered + multiply(thin, pairs(pieces(surprise, MEAN_PIECES), weights, 2))
                mosaic.store_transposed(here.outputs.at[tokens], output)
                if slots > 1:
                    bring_after(jnp.where(i == 0, c - 1, -1))
                return tuple(moved), entered_next, squares

            start = mosaic.zeros((CHUNK,), ROWS)
            mean, entered_next, squares = lax.fori_loop(0, blocks, block, (*carry, start))
            mosaic.barrier_wait(here.free.at[slot])
            now = in_turn(slot, 0)
            read = [load(now.read.at[:, columns]) for columns in tiles]
            entered = reduce(add, [jnp.sum(part, axis=1) for part in read])
            if shares == 1:
                query = load(here.queries_plain.at[slot]).astype(jnp.float32)
                alpha = load(here.alphas.at[slot], ROWS)
                drifted = load(here.drifts.at[slot], ROWS) * jnp.sum(query * query, axis=1)
                fade = alpha * alpha
                if here.faded is not None:
                    fade = fade * jnp.exp(load(here.faded.at[slot], ROWS))
                entered = fade * entered + drifted
            here.variances[...] = jnp.maximum(entered - squares, 0)
            mosaic.commit_smem()
            tokens = pl.ds(c * CHUNK, CHUNK)
            mosaic.copy_out(here.outputs, out["mean"].at[row, tokens])
            mosaic.copy_out(here.variances, out["variance"].at[row, tokens])
            mosaic.copy_out(now.deviations.at[0], out["inverse_deviation"].at[row, tokens])
            if slots == 1:
                bring_after(c)
            return mean, entered_next

        for slot in range(slots):
            bring(slot, slot)
        mean = tuple(load(mean_in.at[row, :, columns]) for columns in tiles)
        entered = mosaic.zeros(thin)
        if ahead:
            mosaic.barrier_wait(here.full.at[0])
            entered = enter(mean, 0, 0)
        mean, _ = lax.fori_loop(0, chunks, chunk, (mean, entered))
        for columns, tile in zip(tiles, mean, strict=True):
            out["last_mean"].at[row, :, columns][...] = tile
        mosaic.wait_out(0)
