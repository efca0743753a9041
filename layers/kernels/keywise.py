r"""The exact filter where every key decays and drifts at its own rate, in blocks of 16 tokens.

The notation is that of `kernels.forward`, with α, c, ε and ρ vectors over keys. A ratio of decays
within the block would be a number for every pair of tokens and key, and its factors overflow. None
is needed of what the state decides: with k̃ = α∘k and x̃ = α∘x,

$$ G_{ts} = \tilde k_t^\top P \tilde k_s + J_{ts},\quad
   X_{ts} = \tilde x_t^\top P \tilde k_s + J'_{ts},\quad
   e_s = \alpha_s\circ P\tilde k_s + c_s\circ k_s $$

where J_ts = Σ_j ρ_tsj c_sj k_tj k_sj and J' (of x_t) depend on no state: `keywise_ratios.prepare`
finds them for all blocks at once, with every ratio at most 1. With G + diag(r) = L Lᵀ, one
elimination gives u from e, each key's column fading at its own rate, and w from V − K̃Mᵀ; another,
at the same time, R = X L⁻ᵀ, in place of the products of queries with u. Then

$$ y_t = M\tilde x_t + \sum_{s \le t} R_{ts} w_s,\quad
   \mathrm{var}_t = \tilde x_t^\top P\tilde x_t + c_t \cdot x_t^2 - \sum_{s \le t} R_{ts}^2 $$

$$ M \leftarrow M\,\mathrm{diag}(\alpha_{16}) + \sum_s w_s (\epsilon_s\circ u_s)^\top,\quad
   P \leftarrow \alpha_{16}\alpha_{16}^\top\circ P + \mathrm{diag}(c_{16})
   - \sum_s (\epsilon_s\circ u_s)(\epsilon_s\circ u_s)^\top. $$

**Layout.** As `kernels.forward` for keys of 64; warpgroup 1, which holds M, has its own
elimination, of R. Keys and queries are float32 once they have decayed: three bfloat16 pieces each,
one chunk in shared memory at a time.

**Bytes** a token of 64 keys and values: 384 + 384 for keys and queries, 1024 for α, c∘k, a and ε,
256 for values, 132 for J and noise; 256 + 512 + 8 written, 512 for states kept.
"""

from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from . import elimination, mosaic
from .covariance import CHUNK, COVARIANCE_PIECES, WIDTH, across, pieces_of
from .forward import MEAN_PIECES, SAVED_PIECES
from .keywise_ratios import Prepared, Rows
from .mosaic import BLOCK, COLUMNS, ROWS, along_columns, along_rows, pairs, pieces


def decays(
    log_decay: Float[Array, "*row time key"], starts: Bool[Array, "*row time"]
) -> Float[Array, "*row time key"]:
    """Decays of each token, a; 0 where a document starts."""
    return jnp.where(starts[..., None], 0, jnp.exp(log_decay))


def filter_keywise(
    prepared: Prepared,
    decay: Rows,
    value: Float[Array, "row time value"],
    noise: Float[Array, "row time"],
    covariance: Float[Array, "row key key"],
    mean: Float[Array, "row value key"],
    *,
    save: bool,
    interpret: bool = False,
) -> dict[str, Array]:
    """Filter rows of 64 values and 64 keys; time is a multiple of 64.

    Args:
        prepared: tokens, as their blocks' rates make them.
        decay: a; 0 where a document starts.
        value: what is written, in float32.
        noise: r.
        covariance: P before the first token.
        mean: M before the first token.
        save: whether the states at every 64th token are wanted.
        interpret: whether to run the kernel's simulation on a CPU.

    Returns:
        As `forward.filter_blocks`.
    """
    rows, time, width = prepared.end.shape
    chunks = time // CHUNK
    f32, bf16 = jnp.float32, jnp.bfloat16
    out = {
        "mean": ((rows, time, WIDTH), f32),
        "variance": ((rows, time), f32),
        "inverse_deviation": ((rows, time), f32),
        "whitened": ((rows, time, width + WIDTH), f32),
        "last_covariance": ((rows, width, width), f32),
        "last_mean": ((rows, WIDTH, width), f32),
    }
    if save:
        out["covariances"] = ((rows, chunks, SAVED_PIECES, width, width), bf16)
        out["means"] = ((rows, chunks, SAVED_PIECES, WIDTH, width), bf16)
    shared = mosaic.SMEM
    operand = shared((1, COVARIANCE_PIECES, CHUNK, width), bf16, transforms=mosaic.THIN)
    plain, ratios = shared((1, CHUNK, WIDTH), f32), shared((1, CHUNK, BLOCK), f32)
    numbers = jnp.stack([noise, prepared.unread], axis=1).reshape(rows, 2, chunks, CHUNK)
    columns = shared((BLOCK, width + WIDTH + 4), f32)
    narrow = shared((BLOCK, CHUNK + 4), f32)

    def pieced(count, height):
        return shared((count, height, BLOCK), bf16, transforms=mosaic.THIN)

    tokens = {
        "keys": (prepared.tokens, operand),
        "queries": (prepared.tokens, operand),
        "values": (value, plain),
        "alphas": (prepared.rates, plain),
        "drifted": (prepared.rates, plain),
        "decays": (decay, plain),
        "ends": (prepared.end, plain),
        "joints": (prepared.joint, ratios),
        "asked": (prepared.asked, ratios),
        "numbers": (jnp.swapaxes(numbers, 1, 2), shared((1, 2, CHUNK), f32)),
        "last": (prepared.last, shared((1, CHUNK // BLOCK, width), f32)),
    }
    copies = len(tokens) + 2 * (COVARIANCE_PIECES - 1)
    scratch = {name: place for name, (_, place) in tokens.items()} | {
        "outputs": shared((CHUNK, WIDTH), f32),
        "read": shared((CHUNK, width + 4), f32),
        "said": shared((3, CHUNK), f32),  # deviations, of either elimination, and variances
        "columns": columns,
        "whitened": columns,
        "questions": narrow,
        "answers": narrow,
        "joint": shared((CHUNK, BLOCK), f32),
        "drawn": pieced(COVARIANCE_PIECES, width),
        "moved": pieced(COVARIANCE_PIECES, width),
        "explained": pieced(MEAN_PIECES, CHUNK),
        "full": mosaic.barrier(num_arrivals=copies),
        **{
            name: mosaic.barrier(num_arrivals=1)
            for name in (
                "free",
                "innovations_ready",
                "drawn_ready",
                "joint_ready",
                "block_free",
                "elimination_ready",
            )
        },
    }
    run = mosaic.kernel(
        partial(_body, chunks=chunks, save=save), out, {"row": rows}, scratch, 2, interpret
    )
    return run(*(array for array, _ in tokens.values()), covariance, mean)


def _body(*inputs, out, place, chunks, save, interpret):
    *sources, covariance_in, mean_in = inputs
    here = SimpleNamespace(**place)
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    thin, square = (WIDTH, BLOCK), (WIDTH, WIDTH)
    multiply = partial(mosaic.product, interpret=interpret)
    load = mosaic.load

    def fetch(chunk):
        tokens, blocks = pl.ds(chunk * CHUNK, CHUNK), CHUNK // BLOCK
        for source, (name, target) in zip(sources, place.items(), strict=False):
            places_of = {
                "last": (pl.ds(chunk * blocks, blocks),),
                "numbers": (chunk,),
                "alphas": (0, tokens),
                "drifted": (1, tokens),
            }
            own = places_of.get(name, (tokens,))
            copies = [(source.at[(row, *own)], target.at[0])]
            if name in ("keys", "queries"):
                which = int(name == "queries")
                copies = [
                    (source.at[row, which, piece, tokens], target.at[0, piece])
                    for piece in range(COVARIANCE_PIECES)
                ]
            for part, spot in copies:
                mosaic.copy_in(part, spot, here.full)

    def leave(name, chunk, state):
        for piece, part in enumerate(pieces(state, SAVED_PIECES)):
            out[name].at[row, chunk, piece][...] = part

    def drawn():
        return [here.drawn.at[piece] for piece in range(COVARIANCE_PIECES)]

    @pl.when(warpgroup == 0)
    def _covariance():
        diagonal = mosaic.index(square, 0) == mosaic.index(square, 1)

        def block(i, covariance):
            start = i * BLOCK
            tokens = pl.ds(start, BLOCK)
            split = pieces(covariance, COVARIANCE_PIECES)
            carried = multiply(thin, pairs(split, pieces_of(here.keys, 0, tokens), 3))
            mosaic.barrier_wait(here.block_free)
            for piece, part in enumerate(pieces(carried, COVARIANCE_PIECES)):
                here.drawn.at[piece][...] = part
            tied = carried * mosaic.load_transposed(here.alphas.at[0, tokens])
            tied = tied + mosaic.load_transposed(here.drifted.at[0, tokens])
            mosaic.store_transposed(here.columns.at[:, pl.ds(0, WIDTH)], tied)
            mosaic.commit_smem()
            mosaic.barrier_arrive(here.drawn_ready)
            between = multiply((CHUNK, BLOCK), pairs(pieces_of(here.keys, 0), drawn(), 3))
            here.joint[...] = between + load(here.joints.at[0])
            mosaic.commit_smem()
            mosaic.barrier_arrive(here.joint_ready)
            mosaic.barrier_wait(here.innovations_ready)
            terms = pairs(split, pieces_of(here.queries, 0, tokens), 3)

            def eliminate():
                elimination.eliminate(
                    here.joint.at[tokens],
                    here.numbers.at[0, 0, tokens],
                    here.decays.at[0, tokens],
                    here.columns,
                    here.whitened,
                    here.said.at[0, tokens],
                    keys=WIDTH,
                    interpret=interpret,
                )

            seen, _ = mosaic.product_beside(thin, terms, eliminate, interpret)
            query = [here.queries.at[0, piece, tokens] for piece in range(COVARIANCE_PIECES)]
            seen = seen * sum(map(mosaic.load_transposed, query))
            mosaic.store_transposed(here.read.at[tokens, pl.ds(0, WIDTH)], seen)
            moved = mosaic.load_transposed(here.whitened.at[:, pl.ds(0, WIDTH)])
            moved = pieces(
                moved * mosaic.load_transposed(here.ends.at[0, tokens]), COVARIANCE_PIECES
            )
            for piece, part in enumerate(moved):
                here.moved.at[piece][...] = part
            mosaic.commit_smem()
            mosaic.barrier_arrive(here.elimination_ready)
            right = across(here.moved, COVARIANCE_PIECES, pl.ds(0, WIDTH))
            absorbed = multiply(square, pairs(moved, right, 3))
            end = here.alphas.at[0, start + BLOCK - 1]
            kept = along_rows(load(end, ROWS), square) * along_columns(load(end, COLUMNS), square)
            added = along_columns(load(here.last.at[0, i], COLUMNS), square)
            added = jnp.where(diagonal, added, jnp.zeros_like(added))
            return covariance * kept + added - absorbed

        def chunk(c, covariance):
            mosaic.barrier_wait(here.full)
            if save:
                leave("covariances", c, covariance)
            covariance = lax.fori_loop(0, CHUNK // BLOCK, block, covariance)
            mosaic.barrier_wait(here.free)

            @pl.when(c + 1 < chunks)
            def _():
                mosaic.commit_smem()  # this warpgroup's own warps may be reading the chunk yet
                fetch(c + 1)

            return covariance

        fetch(0)
        last = lax.fori_loop(0, chunks, chunk, load(covariance_in.at[row]))
        mosaic.barrier_wait(here.block_free)
        out["last_covariance"].at[row][...] = last

    @pl.when(warpgroup == 1)
    def _mean():
        shape = CHUNK, BLOCK
        token, column = mosaic.index(shape, 0), mosaic.index(shape, 1)
        line = mosaic.index((CHUNK,), 0, ROWS)
        values_of = pl.ds(WIDTH, WIDTH)
        mosaic.barrier_arrive(here.block_free)

        def chunk(c, mean):
            mosaic.barrier_wait(here.full)
            mosaic.wait_out(0, wait_read_only=True)
            if save:
                leave("means", c, mean)

            def block(i, carry):
                mean, squares = carry
                start = i * BLOCK
                tokens = pl.ds(start, BLOCK)
                split = pieces(mean, MEAN_PIECES)
                keys = pieces_of(here.keys, 0, tokens)[:MEAN_PIECES]
                expected = multiply(thin, pairs(split, keys, MEAN_PIECES))
                innovation = mosaic.load_transposed(here.values.at[0, tokens]) - expected
                mosaic.store_transposed(here.columns.at[:, values_of], innovation)
                mosaic.commit_smem()
                mosaic.barrier_arrive(here.innovations_ready)
                mosaic.barrier_wait(here.drawn_ready)
                asked = multiply(shape, pairs(pieces_of(here.queries, 0), drawn(), 3))
                asked = asked + load(here.asked.at[0])
                mosaic.store_transposed(here.questions.at[:, pl.ds(0, CHUNK)], asked)
                mosaic.commit_smem()
                mosaic.barrier_wait(here.joint_ready)
                elimination.eliminate(
                    here.joint.at[tokens],
                    here.numbers.at[0, 0, tokens],
                    None,
                    here.questions,
                    here.answers,
                    here.said.at[1, tokens],
                    keys=0,
                    interpret=interpret,
                )
                mosaic.barrier_arrive(here.block_free)
                queries = pieces_of(here.queries, 0, tokens)[:MEAN_PIECES]
                entered = multiply(thin, pairs(split, queries, MEAN_PIECES))
                seen = mosaic.load_transposed(here.answers.at[:, pl.ds(0, CHUNK)])
                seen = jnp.where(token - start >= column, seen, jnp.zeros_like(seen))
                own_squares = jnp.sum(seen * seen, axis=1)
                within = jnp.logical_and(line >= start, line < start + BLOCK)
                squares = jnp.where(within, own_squares, squares)
                for piece, part in enumerate(pieces(seen, MEAN_PIECES)):
                    here.explained.at[piece][...] = part
                mosaic.barrier_wait(here.elimination_ready)
                surprise = pieces(
                    mosaic.load_transposed(here.whitened.at[:, values_of]), MEAN_PIECES
                )
                end = here.alphas.at[0, start + BLOCK - 1]
                kept = along_columns(load(end, COLUMNS), square)
                right = across(here.moved, MEAN_PIECES, pl.ds(0, WIDTH))
                mean = mean * kept + multiply(square, pairs(surprise, right, MEAN_PIECES))
                for t in range(BLOCK):
                    columns = pl.ds(0, 2 * WIDTH)
                    entries = mosaic.load_threads(here.whitened.at[t, columns])
                    out["whitened"].at[row, c * CHUNK + start + t, columns][...] = entries
                mosaic.commit_smem()
                weights = [
                    here.explained.at[piece, tokens].transpose((1, 0))
                    for piece in range(MEAN_PIECES)
                ]
                output = entered + multiply(thin, pairs(surprise, weights, MEAN_PIECES))
                mosaic.store_transposed(here.outputs.at[tokens], output)
                return mean, squares

            start = mosaic.zeros((CHUNK,), ROWS)
            mean, squares = lax.fori_loop(0, CHUNK // BLOCK, block, (mean, start))
            entered = jnp.sum(load(here.read.at[:, pl.ds(0, WIDTH)]), axis=1)
            entered = entered + load(here.numbers.at[0, 1], ROWS)
            here.said.at[2][...] = jnp.maximum(entered - squares, 0)
            mosaic.commit_smem()
            tokens = pl.ds(c * CHUNK, CHUNK)
            mosaic.copy_out(here.outputs, out["mean"].at[row, tokens])
            mosaic.copy_out(here.said.at[2], out["variance"].at[row, tokens])
            mosaic.copy_out(here.said.at[0], out["inverse_deviation"].at[row, tokens])
            mosaic.barrier_arrive(here.free)
            return mean

        last = lax.fori_loop(0, chunks, chunk, load(mean_in.at[row]))
        out["last_mean"].at[row][...] = last
        mosaic.wait_out(0)
