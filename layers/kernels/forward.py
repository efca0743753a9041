r"""The exact filter in blocks of 16 tokens on the tensor cores, one program a head.

A block starts from P and M; α_t is the decay since its start, ρ_ts that between two of its tokens
(s ≤ t), ε_s that to its end, and c_t the variance added since its start. With

$$ e_s = \alpha_s^2 P k_s + c_s k_s,\quad G_{ts} = \rho_{ts}\, k_t^\top e_s,\quad
   G + \mathrm{diag}(r) = L L^\top $$

elimination gives the whitened covariances u of the block's values with the memory, each at its own
time, and W = L⁻¹(V − α K Mᵀ), the whitened innovations (`mosaic.eliminate`). Then

$$ X_{ts} = \rho_{ts}\, x_t^\top u_s,\quad y_t = \alpha_t M x_t + \sum_s X_{ts} w_s,\quad
   \mathrm{var}_t = \alpha_t^2 x_t^\top P x_t + c_t |x_t|^2 - \sum_s X_{ts}^2 $$

$$ M \leftarrow \alpha_{16} M + \sum_s \epsilon_s w_s u_s^\top,\quad
   P \leftarrow \alpha_{16}^2 P + c_{16} I - \sum_s \epsilon_s^2 u_s u_s^\top $$

Every ratio is at most 1, so no decay is too strong, and 0 where a document starts between.

**Layout.** Warpgroup 0 holds P (64 × 64 float32) in registers, warpgroup 1 holds M; both are split
into bfloat16 pieces (`mosaic.pieces`), three for P and two for M, as left operands of the tensor
cores. Warpgroup 0 eliminates while its tensor cores find P x for the variances. Sums are float32.

**Bytes** a token of bfloat16 inputs: 640 read for keys and queries (twice each, in two forms of
shared memory) and values, 84 for rates; 256 written for the mean, 512 for what is whitened, 8 for
variances, 512 for the states that a backward pass starts from.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .blocks import Rates
from .mosaic import BLOCK, COLUMNS, ROWS, along_columns, pairs, pieces

WIDTH = 64
CHUNK = 64
"""Tokens that are copied together, and between saved states."""

PITCH = 2 * WIDTH + 4
COVARIANCE_PIECES, MEAN_PIECES, SAVED_PIECES = 3, 2, 2

Rows = Float[Array, "row time width"]
Numbers = Float[Array, "row time"]
States = Float[Array, "row width width"]


def filter_blocks(
    key: Rows,
    value: Rows,
    query: Rows,
    rates: Rates,
    covariance: States,
    mean: States,
    *,
    save: bool,
    interpret: bool = False,
) -> dict[str, Array]:
    """Filter rows of 64-wide keys and values; time is a multiple of 64.

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
        (row, time, 128) which holds u and then w, `last_covariance`, `last_mean`, and where saved
        `covariances` and `means` in bfloat16 pieces (row, chunk, piece, 64, 64).
    """
    rows, time, _ = key.shape
    exact = key.dtype == jnp.bfloat16
    depth = 1 if exact else COVARIANCE_PIECES
    chunks = time // CHUNK
    slots = min(3, chunks) if exact else 1
    lag = min(1, slots - 1)
    f32, square = jnp.float32, (WIDTH, WIDTH)
    out = {
        "mean": ((rows, time, WIDTH), f32),
        "variance": ((rows, time), f32),
        "inverse_deviation": ((rows, time), f32),
        "whitened": ((rows, time, 2 * WIDTH), f32),
        "last_covariance": ((rows, *square), f32),
        "last_mean": ((rows, *square), f32),
    }
    if save:
        states = (rows, chunks, SAVED_PIECES, *square)
        out |= {name: (states, jnp.bfloat16) for name in ("covariances", "means")}
    shared = mosaic.SMEM
    operand = shared((slots, depth, CHUNK, WIDTH), jnp.bfloat16, transforms=mosaic.THIN)
    plain = shared((slots, CHUNK, WIDTH), key.dtype)
    numbers = shared((slots, CHUNK), f32)
    wide = shared((BLOCK, PITCH), f32)
    pieced = shared((COVARIANCE_PIECES, WIDTH, BLOCK), jnp.bfloat16, transforms=mosaic.THIN)
    scratch = [
        operand,
        plain,
        operand,
        plain,
        plain,
        *[numbers] * 5,
        shared((slots, CHUNK, BLOCK), f32),
        shared((CHUNK, WIDTH), f32),
        shared((CHUNK, WIDTH + 4), f32),
        shared((CHUNK,), f32),
        shared((CHUNK,), f32),
        wide,
        wide,
        shared((CHUNK, BLOCK), f32),
        pieced,
        pieced,
        shared((MEAN_PIECES, CHUNK, BLOCK), jnp.bfloat16, transforms=mosaic.THIN),
        mosaic.barrier(num_arrivals=9 + 2 * depth, num_barriers=slots),
        mosaic.barrier(num_arrivals=1, num_barriers=slots),
        mosaic.barrier(num_arrivals=1),
        mosaic.barrier(num_arrivals=1),
    ]
    body = partial(_body, names=tuple(out), chunks=chunks, slots=slots, lag=lag, save=save)
    run = mosaic.kernel(
        partial(body, interpret=interpret),
        [jax.ShapeDtypeStruct(*kind) for kind in out.values()],
        {"row": rows},
        scratch,
        2,
        interpret,
    )
    found = run(split(key, depth), key, split(query, depth), query, value, *rates, covariance, mean)
    return dict(zip(out, found, strict=True))


def split(rows: Rows, depth: int) -> Float[Array, "row piece time width"]:
    """Bfloat16 pieces of rows, which sum to them but for what `depth` pieces cannot hold."""
    if depth == 1:
        return rows[:, None]
    out, rest = [], rows
    for _ in range(depth):
        rounded = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        out.append(rounded.astype(jnp.bfloat16))
        rest = rest - rounded
    return jnp.stack(out, axis=1)


def _body(*refs, names, chunks, slots, lag, save, interpret):
    inputs, refs = refs[:13], refs[13:]
    out, scratch = dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]
    (keys, keys_plain, queries, queries_plain, values, *rates) = scratch[:11]
    (outputs, read, variances, deviations, columns, whitened, joint) = scratch[11:18]
    (drawn, moved, explained, full, free, innovations_ready, elimination_ready) = scratch[18:]
    noises, alphas, drifts, ends, decays, ratios = rates
    row, warpgroup = lax.axis_index("row"), lax.axis_index("wg")
    thin, square = (WIDTH, BLOCK), (WIDTH, WIDTH)
    multiply = partial(mosaic.product, interpret=interpret)
    load = mosaic.load

    def operands(ref, slot, tokens=None):
        depth = ref.shape[1]
        if tokens is None:
            return [ref.at[slot, piece] for piece in range(depth)]
        return [ref.at[slot, piece, tokens].transpose((1, 0)) for piece in range(depth)]

    def fetch(chunk, slot):
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        for source, target in zip(inputs[:11], scratch[:11], strict=True):
            if len(source.shape) == 4:
                copies = [
                    (source.at[row, p, tokens], target.at[slot, p]) for p in range(source.shape[1])
                ]
            else:
                copies = [(source.at[row, tokens], target.at[slot])]
            for part, place in copies:
                mosaic.copy_in(part, place, full.at[slot])

    def leave(name, chunk, state):
        for piece, part in enumerate(pieces(state, SAVED_PIECES)):
            out[name].at[row, chunk, piece][...] = part

    @pl.when(warpgroup == 0)
    def _covariance():
        diagonal = mosaic.index(square, 0) == mosaic.index(square, 1)
        identity = jnp.where(diagonal, jnp.float32(1), jnp.float32(0))
        for slot in range(slots):
            fetch(slot, slot)

        def chunk(c, covariance):
            slot = lax.rem(c, slots)
            mosaic.barrier_wait(full.at[slot])
            if save:
                leave("covariances", c, covariance)

            def block(i, covariance):
                start = i * BLOCK
                tokens = pl.ds(start, BLOCK)
                split = pieces(covariance, COVARIANCE_PIECES)
                alpha = load(alphas.at[slot, tokens], COLUMNS)
                drift = along_columns(load(drifts.at[slot, tokens], COLUMNS), thin)
                carried = multiply(thin, pairs(split, operands(keys, slot, tokens), 3))
                tied = carried * along_columns(alpha * alpha, thin)
                tied = tied + mosaic.load_transposed(keys_plain.at[slot, tokens]) * drift
                mosaic.store_transposed(columns.at[:, pl.ds(0, WIDTH)], tied)
                for piece, part in enumerate(pieces(tied, COVARIANCE_PIECES)):
                    drawn.at[piece][...] = part
                mosaic.commit_smem()
                drawn_pieces = [drawn.at[piece] for piece in range(COVARIANCE_PIECES)]
                between = multiply((CHUNK, BLOCK), pairs(operands(keys, slot), drawn_pieces, 3))
                joint[...] = between * load(ratios.at[slot])
                mosaic.barrier_wait(innovations_ready)

                def eliminate():
                    mosaic.eliminate(
                        joint.at[tokens],
                        noises.at[slot, tokens],
                        decays.at[slot, tokens],
                        columns,
                        whitened,
                        deviations.at[tokens],
                        interpret,
                    )

                terms = pairs(split, operands(queries, slot, tokens), 3)
                seen = mosaic.product_beside(thin, terms, eliminate, interpret)
                seen = seen * mosaic.load_transposed(queries_plain.at[slot, tokens])
                mosaic.store_transposed(read.at[tokens, pl.ds(0, WIDTH)], seen)
                own = mosaic.load_transposed(whitened.at[:, pl.ds(0, WIDTH)])
                for piece, part in enumerate(pieces(own, COVARIANCE_PIECES)):
                    moved.at[piece][...] = part
                mosaic.commit_smem()
                mosaic.barrier_arrive(elimination_ready)
                end = load(ends.at[slot, tokens], COLUMNS)
                left = pieces(own * along_columns(end * end, thin), COVARIANCE_PIECES)
                right = [moved.at[p].transpose((1, 0)) for p in range(COVARIANCE_PIECES)]
                absorbed = multiply(square, pairs(left, right, 3))
                kept = alphas[slot, start + BLOCK - 1]
                added = drifts[slot, start + BLOCK - 1]
                return covariance * (kept * kept) + identity * added - absorbed

            covariance = lax.fori_loop(0, CHUNK // BLOCK, block, covariance)

            @pl.when(jnp.logical_and(c >= lag, c - lag + slots < chunks))
            def _():
                done = lax.rem(c - lag, slots)
                mosaic.barrier_wait(free.at[done])
                if lag == 0:  # this warpgroup's own warps may be reading the chunk yet
                    mosaic.commit_smem()
                fetch(c - lag + slots, done)

            return covariance

        covariance = lax.fori_loop(0, chunks, chunk, load(inputs[11].at[row]))
        for c in range(chunks - slots, chunks):
            mosaic.barrier_wait(free.at[c % slots])
        out["last_covariance"].at[row][...] = covariance

    @pl.when(warpgroup == 1)
    def _mean():
        token = mosaic.index((CHUNK,), 0, ROWS)

        def chunk(c, mean):
            slot = lax.rem(c, slots)
            mosaic.barrier_wait(full.at[slot])
            mosaic.wait_out(0, wait_read_only=True)
            if save:
                leave("means", c, mean)

            def block(i, carry):
                mean, squares = carry
                start = i * BLOCK
                tokens = pl.ds(start, BLOCK)
                split = pieces(mean, MEAN_PIECES)
                alpha = along_columns(load(alphas.at[slot, tokens], COLUMNS), thin)
                expected = multiply(thin, pairs(split, operands(keys, slot, tokens), 2))
                innovation = mosaic.load_transposed(values.at[slot, tokens]) - expected * alpha
                mosaic.store_transposed(columns.at[:, pl.ds(WIDTH, WIDTH)], innovation)
                mosaic.barrier_arrive(innovations_ready)
                entered = multiply(thin, pairs(split, operands(queries, slot, tokens), 2)) * alpha
                mosaic.barrier_wait(elimination_ready)
                surprise = mosaic.load_transposed(whitened.at[:, pl.ds(WIDTH, WIDTH)])
                end = along_columns(load(ends.at[slot, tokens], COLUMNS), thin)
                right = [moved.at[p].transpose((1, 0)) for p in range(MEAN_PIECES)]
                left = pieces(surprise * end, MEAN_PIECES)
                kept = alphas[slot, start + BLOCK - 1]
                mean = mean * kept + multiply(square, pairs(left, right, 2))
                own = [moved.at[piece] for piece in range(COVARIANCE_PIECES)]
                seen = multiply((CHUNK, BLOCK), pairs(operands(queries, slot), own, 3))
                seen = seen * load(ratios.at[slot])
                own_squares = jnp.sum(seen * seen, axis=1)
                here = jnp.logical_and(token >= start, token < start + BLOCK)
                squares = jnp.where(here, own_squares, squares)
                for piece, part in enumerate(pieces(seen, MEAN_PIECES)):
                    explained.at[piece][...] = part
                for t in range(BLOCK):
                    line = mosaic.load_threads(whitened.at[t, pl.ds(0, 2 * WIDTH)])
                    out["whitened"].at[row, c * CHUNK + start + t][...] = line
                mosaic.commit_smem()
                weights = [explained.at[p, tokens].transpose((1, 0)) for p in range(MEAN_PIECES)]
                output = entered + multiply(thin, pairs(pieces(surprise, MEAN_PIECES), weights, 2))
                mosaic.store_transposed(outputs.at[tokens], output)
                return mean, squares

            start = mosaic.zeros((CHUNK,), ROWS)
            mean, squares = lax.fori_loop(0, CHUNK // BLOCK, block, (mean, start))
            query = load(queries_plain.at[slot]).astype(jnp.float32)
            alpha = load(alphas.at[slot], ROWS)
            entered = jnp.sum(load(read.at[:, pl.ds(0, WIDTH)]), axis=1)
            drifted = load(drifts.at[slot], ROWS) * jnp.sum(query * query, axis=1)
            variances[...] = jnp.maximum(alpha * alpha * entered + drifted - squares, 0)
            mosaic.commit_smem()
            tokens = pl.ds(c * CHUNK, CHUNK)
            mosaic.copy_out(outputs, out["mean"].at[row, tokens])
            mosaic.copy_out(variances, out["variance"].at[row, tokens])
            mosaic.copy_out(deviations, out["inverse_deviation"].at[row, tokens])
            mosaic.barrier_arrive(free.at[slot])
            return mean

        mean = lax.fori_loop(0, chunks, chunk, load(inputs[12].at[row]))
        out["last_mean"].at[row][...] = mean
        mosaic.wait_out(0)
