r"""What segments ask of the beliefs that enter them: the gradient's recursion, and nothing else.

The recursion of `kernels.reverse`, of which `sweep` finds M̄ and P̄ at the start of a row alone. For
these neither the states that were kept nor what tokens get are wanted: 31 of the 51 products of
64 × 64 × 64 that a chunk of bfloat16 keys takes in `reverse.recur`, and no output a token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, WIDTH
from .reverse import PIECES, SHARES, SQUARE, Pieces, Share, numbers_of, opaque_zero

States = Float[Array, "row key key"]


def sweep(
    key: Float[Array, "row piece time key"],
    query: Float[Array, "row piece time key"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    found: tuple[Array, ...],
    of_last_mean: States,
    of_last_covariance: States,
    *,
    interpret: bool = False,
) -> tuple[States, States]:
    """Cotangents of the mean and the covariance before the first token.

    Args:
        key: in pieces, as are queries.
        query: in pieces.
        of_mean: cotangent of read-outs.
        numbers: of every token (`reverse.Numbers`).
        found: what `reverse.local` returns.
        of_last_mean: cotangent of the mean after the last token.
        of_last_covariance: likewise, symmetric.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, depth, time, _ = key.shape
    form = mosaic.operands_of(WIDTH // SHARES)
    operand = mosaic.SMEM((1, PIECES, *SQUARE), jnp.bfloat16, transforms=form)
    given = mosaic.SMEM((1, depth, *SQUARE), jnp.bfloat16, transforms=form)
    run = mosaic.kernel(
        partial(_sweep, chunks=time // CHUNK, interpret=interpret),
        [jax.ShapeDtypeStruct((rows, WIDTH, WIDTH), jnp.float32)] * 2,
        {"row": rows},
        [
            given,
            given,
            *[operand] * 9,
            mosaic.SMEM((2, *numbers.shape[2:]), jnp.float32),
            mosaic.barrier(num_arrivals=2 * depth + PIECES),
            mosaic.barrier(num_arrivals=2 * PIECES),
            mosaic.barrier(num_arrivals=1, num_barriers=2),
            mosaic.barrier(num_arrivals=SHARES),
        ],
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    first_mean, first_covariance = run(
        key, query, of_mean, numbers, *found, of_last_mean, of_last_covariance
    )
    return first_mean, first_covariance


def _sweep(*refs, chunks, interpret):
    key, query, of_mean, numbers_in = refs[:4]
    pieced, (of_value_in, of_joint_in) = refs[4:7], refs[7:9]
    of_last_mean, of_last_covariance, first_mean, first_covariance = refs[9:13]
    *buffers, vectors, arrived, handed, numbered, met = refs[13:]
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    here = Share(share, WIDTH // SHARES, interpret)

    def fetch_numbers(c, slot):
        mosaic.copy_in(numbers_in.at[row, c], vectors.at[slot], numbered.at[slot])

    @pl.when(share == 0)
    def _():
        fetch_numbers(chunks - 1, 0)

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c = chunks - 1 - step
        tokens, slot = pl.ds(c * CHUNK, CHUNK), lax.rem(step, 2)
        numbers = numbers_of(vectors.at[slot])

        @pl.when(share == 0)
        def _():
            barriers = handed, handed, arrived
            for source, target, barrier in zip(pieced, buffers[2:5], barriers, strict=True):
                for piece in range(PIECES):
                    mosaic.copy_in(source.at[row, c, piece], target.at[0, piece], barrier)
            for source, target in ((key, buffers[0].at[0]), (query, buffers[1].at[0])):
                for piece in range(target.shape[0]):
                    mosaic.copy_in(source.at[row, piece, tokens], target.at[piece], arrived)
            before = jnp.maximum(c - 1, 0)

            @pl.when(c > 0)
            def _():
                fetch_numbers(before, 1 - slot)

            for ref in (*pieced, of_value_in, of_joint_in):
                mosaic.prefetch(ref.at[row, before], interpret)
            mosaic.prefetch(of_mean.at[row, pl.ds(before * CHUNK, CHUNK)], interpret)

        mosaic.barrier_wait(numbered.at[slot])
        fade, kept = here.along(numbers.alpha), vectors[slot, 2, CHUNK - 1]
        only = opaque_zero(vectors, slot)
        places = [Pieces(ref.at[only]) for ref in buffers]
        keys, queries, weights, spreads, reads, *places = places
        of_means, of_covariances, of_values, joints, given, squares = places
        cotangent = here.load(of_mean.at[row, tokens])
        of_value, of_joint = here.load(of_value_in.at[row, c]), here.load(of_joint_in.at[row, c])
        here.put(of_means.ref, of_mean_end)
        here.put(of_covariances.ref, of_covariance_end)
        here.put(given.ref, fade * cotangent)
        mosaic.barrier_wait(handed)
        mosaic.meet(met, interpret)
        guided = here.times((spreads, of_means))
        spread = here.times((weights, of_covariances))
        of_value = of_value + here.times((weights, of_means.T))
        here.put(squares.ref, guided - spread)
        here.put(of_values.ref, -fade * of_value)
        of_tied = here.along(numbers.end) * (guided - 2 * spread)
        mosaic.meet(met, interpret)
        between = here.times((squares, weights.T), (weights, squares.T))
        here.put(joints.ref, of_joint - here.halved(between) * here.ratios(numbers))
        mosaic.barrier_wait(arrived)
        mosaic.meet(met, interpret)
        of_tied = of_tied + here.times((joints.T, keys), (reads.T, queries))
        here.put(spreads.ref, fade * fade * of_tied)
        of_read_variance = here.along(numbers.of_variance)
        here.put(squares.ref, fade * fade * of_read_variance * here.plain(queries.ref))
        mosaic.meet(met, interpret)
        of_mean_start = kept * of_mean_end + here.times((of_values.T, keys), (given.T, queries))
        crossed = here.times((keys.T, spreads), (spreads.T, keys))
        squared = here.times((queries.T, squares))
        of_covariance_start = kept * kept * of_covariance_end + 0.5 * crossed + squared
        mosaic.meet(met, interpret)
        return of_mean_start, of_covariance_start

    start = here.load(of_last_mean.at[row]), here.load(of_last_covariance.at[row])
    of_mean_start, of_covariance_start = lax.fori_loop(0, chunks, chunk, start)
    first_mean.at[row, :, here.columns][...] = of_mean_start
    first_covariance.at[row, :, here.columns][...] = of_covariance_start
