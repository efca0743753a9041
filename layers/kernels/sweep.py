r"""What segments ask of the beliefs that enter them: the gradient's recursion, and nothing else.

The recursion of `kernels.reverse`, of which `sweep` finds M̄ and P̄ at the start of a row alone. For
these neither the states that were kept nor what tokens get are wanted: 31 of the 51 products of
64 × 64 × 64 that a chunk of bfloat16 keys takes in `reverse.recur`, and no output a token.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, WIDTH
from .matrices import PIECES, SHARES, Memory, Share
from .reverse import from_last, guide, of_start

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
        numbers: of every token (`matrices.Numbers`).
        found: what `local.local` returns.
        of_last_mean: cotangent of the mean after the last token.
        of_last_covariance: likewise, symmetric.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, depth, time, _ = key.shape
    held = "reads", "of_values", "joints", "given", "squares"
    scratch = Memory.scratch(depth, numbers, held, {"tokens_there": 2 * depth + PIECES})
    run = mosaic.kernel(
        partial(_sweep, chunks=time // CHUNK),
        dict.fromkeys(("first_mean", "first_covariance"), ((rows, WIDTH, WIDTH), jnp.float32)),
        {"row": rows},
        scratch,
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    got = run(key, query, of_mean, numbers, *found, of_last_mean, of_last_covariance)
    return got["first_mean"], got["first_covariance"]


def _sweep(*inputs, out, place, chunks, interpret):
    key, query, of_mean, numbers_in, weights_in, spreads_in, reads_in = inputs[:7]
    of_value_in, of_joint_in, of_last_mean, of_last_covariance = inputs[7:]
    memory = Memory(place, interpret)
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    own = Share(share, WIDTH // SHARES, interpret)

    memory.number(share == 0, 0, numbers_in.at[row, chunks - 1])
    memory.hand(share == 0, 0, weights_in.at[row, chunks - 1], spreads_in.at[row, chunks - 1])

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c, before, tokens, slot = from_last(step, chunks)
        copies, copies_next = share == 0, jnp.logical_and(share == 0, c > 0)
        numbers, here, held = memory.enter(slot, share)
        memory.bring(copies, "tokens_there", (key.at[row, :, tokens], held.keys.ref))
        fade, since = here.along(numbers.alpha), here.since(numbers)
        kept = numbers.alpha[CHUNK - 1]
        here.put(held.of_means.ref, of_mean_end)
        here.put(held.of_covariances.ref, of_covariance_end)
        memory.wait("handed")
        held = memory.next_phase(slot)
        of_value = here.load(of_value_in.at[row, c])
        cotangent = here.load(of_mean.at[row, tokens])

        def bring_queries():
            memory.bring(
                copies,
                "tokens_there",
                (query.at[row, :, tokens], held.queries.ref),
                (reads_in.at[row, c], held.reads.ref),
            )

        guided, spread = guide(here, held, bring_queries)

        def leave_square():
            here.put(held.squares.ref, guided - spread)
            here.put(held.given.ref, fade * cotangent)

        explained, _ = here.beside(leave_square, (held.weights, held.of_means.T))
        here.put(held.of_values.ref, -fade * (of_value + explained))
        of_tied = here.along(numbers.end) * (guided - 2 * spread)
        held = memory.next_phase(slot)
        of_joint = here.load(of_joint_in.at[row, c])

        def find_ratios():
            memory.number(copies_next, 1 - slot, numbers_in.at[row, before])
            return here.ratios(numbers)

        between, ratios = here.beside(
            find_ratios, (held.squares, held.weights.T), (held.weights, held.squares.T)
        )
        here.put(held.joints.ref, of_joint - here.halved(between) * ratios)
        memory.wait("tokens_there")
        held = memory.next_phase(slot)

        def leave_asked():
            following = weights_in.at[row, before], spreads_in.at[row, before]
            memory.hand(copies_next, 1 - slot, *following)
            asked = 2 * since * here.along(numbers.of_variance) * here.plain(held.queries.ref)
            here.put(held.squares.ref, asked)

        asked, _ = here.beside(
            leave_asked, (held.joints.T, held.keys), (held.reads.T, held.queries)
        )
        here.put(held.spreads.ref, since * (of_tied + asked))
        held = memory.next_phase(slot)

        def foresee():
            values, joints = (ref.at[row, before] for ref in (of_value_in, of_joint_in))
            memory.foresee(copies, values, joints, of_mean.at[row, pl.ds(before * CHUNK, CHUNK)])

        of_mean_start, doubled = of_start(here, held, foresee)
        memory.meet()
        of_covariance_start = kept * kept * of_covariance_end + 0.5 * doubled
        return kept * of_mean_end + of_mean_start, of_covariance_start

    start = own.load(of_last_mean.at[row]), own.load(of_last_covariance.at[row])
    of_mean_start, of_covariance_start = lax.fori_loop(0, chunks, chunk, start)
    out["first_mean"].at[row, :, own.columns][...] = of_mean_start
    out["first_covariance"].at[row, :, own.columns][...] = of_covariance_start
