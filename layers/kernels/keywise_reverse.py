r"""The recursion of `kernels.reverse` through chunks, where every key has its own rates.

All that involves states are products of k̃ = α∘k and x̃ = α∘x, with no ratio: B and Θ are those of
`kernels.local`, Ψ = diag(α_C) − k̃ᵀB, Λ = Θᵀk̃, and with Ĝ, H̄, V̄ and F̄ = ΘM̄' − 2BP̄' of a chunk

$$ E = \hat G^\top \tilde K + \bar H^\top \tilde X + \bar F\,\mathrm{diag}(\alpha_C),\quad
   T = \hat G \tilde K + E,\quad S = \bar H \tilde K + 2 \bar v \tilde X $$
$$ \bar{\tilde K} = T P - \bar V M,\quad \bar{\tilde X} = S P + \bar Y M,\quad
   \bar M = \bar M'\mathrm{diag}(\alpha_C) - \bar V^\top\tilde K + \bar Y^\top\tilde X $$
$$ \bar P = \alpha_C\alpha_C^\top\circ\bar P' + \mathrm{sym}(\tilde K^\top E
   + \bar v\tilde X^\top\tilde X). $$

What the chunk's own drift asks, which needs ratios, is found from Ĝ, H̄ and F̄ by
`keywise_drift.of_drift`. The layout is that of `reverse.recur`.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, WIDTH
from .matrices import PIECES, SHARES, SQUARE, Memory, Share
from .reverse import from_last, guide, of_start

SUMS = "noise", "trace", "scale"


def recur(
    tokens: Float[Array, "row two piece time key"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    found: tuple[Array, ...],
    means: Float[Array, "row chunk piece_of_state value key"],
    covariances: Float[Array, "row chunk piece_of_state key key"],
    of_last_mean: Float[Array, "row value key"],
    of_last_covariance: Float[Array, "row key key"],
    *,
    interpret: bool = False,
) -> dict[str, Array]:
    """Pass through the chunks from the last to the first.

    Args:
        tokens: k̃ and x̃, in pieces.
        of_mean: cotangent of read-outs.
        numbers: of every token (`matrices.Numbers`).
        found: what `local.local_of_factors` returns.
        means: M at the start of every chunk.
        covariances: P, likewise.
        of_last_mean: cotangent of the mean after the last token.
        of_last_covariance: likewise, symmetric.
        interpret: whether to run the kernel's simulation on a CPU.

    Returns:
        Cotangents of k̃ and x̃ (`tokens`, row, 2, time, 64) but for the chunk's own drift, of
        `value` (row, time, 64) and `noise`; F̄ (`ends`, row, time, 64), Ĝ and H̄ (`weights`, row,
        chunk, 2, 64, 64); at every chunk's start M̄ (`means`), `trace`, the diagonal of P̄, and
        `scale`, the sums over a key's row of 2 P∘P̄; P̄ before the first token, `first_covariance`.
    """
    rows, _, depth, time, _ = tokens.shape
    chunks = time // CHUNK
    shapes = {
        "tokens": (rows, 2, time, WIDTH),
        **dict.fromkeys(("value", "ends"), (rows, time, WIDTH)),
        "weights": (rows, chunks, 2, *SQUARE),
        "means": (rows, chunks, *SQUARE),
        "noise": (rows, SHARES, time),
        **dict.fromkeys(("trace", "scale"), (rows, SHARES, chunks, WIDTH)),
        "first_covariance": (rows, WIDTH, WIDTH),
    }
    held = "reads", "mean", "covariance", "of_values", "joints", "given", "squares"
    arrivals = {
        "keys_there": depth + PIECES,
        "queries_there": depth + PIECES,
        "mean_there": PIECES,
    }
    scratch = Memory.scratch(depth, numbers, held, arrivals)
    run = mosaic.kernel(
        partial(_recur, chunks=chunks),
        {name: (shape, jnp.float32) for name, shape in shapes.items()},
        {"row": rows},
        scratch,
        SHARES,
        interpret,
    )
    states = means, covariances, of_last_mean, of_last_covariance
    got = run(tokens, of_mean, numbers, *found, *states)
    return got | {name: got[name].sum(axis=1) for name in SUMS}


def _recur(*inputs, out, place, chunks, interpret):
    tokens_in, of_mean, numbers_in, weights_in, spreads_in, reads_in = inputs[:6]
    of_value_in, of_joint_in, means_in, covariances_in = inputs[6:10]
    of_last_mean, of_last_covariance = inputs[10:]
    memory = Memory(place, interpret)
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    own = Share(share, WIDTH // SHARES, interpret)

    memory.number(share == 0, 0, numbers_in.at[row, chunks - 1])
    memory.hand(share == 0, 0, weights_in.at[row, chunks - 1], spreads_in.at[row, chunks - 1])

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c, before, tokens, slot = from_last(step, chunks)
        copies, copies_next = share == 0, jnp.logical_and(share == 0, c > 0)

        def leave(name, matrix, *at):
            out[name].at[(row, *at, here.columns)][...] = matrix

        def leave_sum(name, matrix):
            at = tokens if name == "noise" else c
            out[name].at[row, share, at][...] = jnp.sum(matrix, axis=1)

        numbers, here, held = memory.enter(slot, share)
        memory.bring(
            copies,
            "keys_there",
            (covariances_in.at[row, c], held.covariance.ref),
            (tokens_in.at[row, 0, :, tokens], held.keys.ref),
        )
        here.put(held.of_means.ref, of_mean_end)
        here.put(held.of_covariances.ref, of_covariance_end)
        memory.wait("handed")
        held = memory.next_phase(slot)
        of_value = here.load(of_value_in.at[row, c])
        cotangent = here.load(of_mean.at[row, tokens])

        def bring_queries():
            memory.bring(
                copies,
                "queries_there",
                (tokens_in.at[row, 1, :, tokens], held.queries.ref),
                (reads_in.at[row, c], held.reads.ref),
            )

        guided, spread = guide(here, held, bring_queries)

        def leave_square():
            here.put(held.squares.ref, guided - spread)
            here.put(held.given.ref, cotangent)

        explained, _ = here.beside(leave_square, (held.weights, held.of_means.T))
        of_value = of_value + explained
        leave("value", of_value, tokens)
        here.put(held.of_values.ref, -of_value)
        of_end = guided - 2 * spread
        leave("ends", of_end, tokens)
        of_end = here.across(numbers.alpha) * of_end
        held = memory.next_phase(slot)
        of_joint = here.load(of_joint_in.at[row, c])

        def bring_mean():
            memory.bring(copies, "mean_there", (means_in.at[row, c], held.mean.ref))
            memory.number(copies_next, 1 - slot, numbers_in.at[row, before])

        between, _ = here.beside(
            bring_mean, (held.squares, held.weights.T), (held.weights, held.squares.T)
        )
        joint = of_joint - here.halved(between)
        leave_sum("noise", here.diagonal(joint))
        leave("weights", joint, c, 0, slice(None))
        here.put(held.joints.ref, joint)
        memory.wait("keys_there")
        memory.wait("queries_there")
        held = memory.next_phase(slot)
        leave("weights", here.plain(held.reads.ref), c, 1, slice(None))

        def leave_asked():
            following = weights_in.at[row, before], spreads_in.at[row, before]
            memory.hand(copies_next, 1 - slot, *following)
            asked = 2 * here.along(numbers.of_variance) * here.plain(held.queries.ref)
            here.put(held.squares.ref, asked)
            return asked

        tied, asked = here.beside(
            leave_asked, (held.joints.T, held.keys), (held.reads.T, held.queries)
        )
        tied = tied + of_end

        def leave_tied():
            here.put(held.spreads.ref, tied)
            return here.times((held.reads, held.keys))

        turned, seen = here.beside(leave_tied, (held.joints, held.keys))
        here.put(held.weights.ref, turned + tied)
        asked = asked + seen
        held = memory.next_phase(slot)

        def foresee():
            values, joints = (ref.at[row, before] for ref in (of_value_in, of_joint_in))
            memory.foresee(copies, values, joints, of_mean.at[row, pl.ds(before * CHUNK, CHUNK)])
            here.put(held.joints.ref, asked)

        of_mean_start, doubled = of_start(here, held, foresee)
        kept = here.across(numbers.alpha)
        of_mean_start = kept * of_mean_end + of_mean_start
        through = here.along(numbers.alpha) * kept
        of_covariance_start = through * of_covariance_end + 0.5 * doubled
        memory.wait("mean_there")
        held = memory.next_phase(slot)

        def leave_start():
            leave("means", of_mean_start, c, slice(None))
            leave_sum("scale", 2 * here.plain(held.covariance.ref) * of_covariance_start)
            leave_sum("trace", here.diagonal(of_covariance_start))

        of_key, _ = here.beside(
            leave_start, (held.weights, held.covariance), (held.of_values, held.mean)
        )
        of_query, _ = here.beside(
            lambda: leave("tokens", of_key, 0, tokens),
            (held.joints, held.covariance),
            (held.given, held.mean),
        )
        leave("tokens", of_query, 1, tokens)
        memory.meet()
        return of_mean_start, of_covariance_start

    start = own.load(of_last_mean.at[row]), own.load(of_last_covariance.at[row])
    _, first_covariance = lax.fori_loop(0, chunks, chunk, start)
    out["first_covariance"].at[row, :, own.columns][...] = first_covariance
