r"""The gradient of the exact filter from chunk-start states, as matrix products alone.

A chunk of 64 tokens starts from P and M. In the notation of `kernels.forward`, with the chunk in
place of its block, and Ω the cotangent of what Ω names (written with a bar below),

$$ L = \mathrm{tril}(\rho \circ K U^\top, -1) + \mathrm{diag}(\sqrt{s}),\quad
   R = \rho \circ X U^\top,\quad y = \alpha X M^\top + R W,\quad e = \alpha^2 K P + c K $$

where u, w and s of every token are what the forward pass has left: nothing is factored again.
Tokens reach the loss through the chunk's readings,

$$ \bar W = R^\top \bar Y - \bar\ell W,\quad \bar R = \mathrm{tril}(\bar Y W^\top - 2\bar v R),\quad
   Z = \bar W W^\top + \bar R^\top R,\quad \bar H = \bar R L^{-1} $$

and through the state at its end, M' and P', by B = L⁻ᵀ(εU) and Θ = L⁻ᵀW,

$$ \bar F = \Theta \bar M' - 2 B \bar P',\quad \bar V = L^{-\top}\bar W + B \bar M'^\top,\quad
   \bar G = -\mathrm{sym}\bigl(L^{-\top}(\Phi(Z) + \tfrac{V}{2}\bar\ell) L^{-1}
   + (\Theta\bar M' - B\bar P')B^\top\bigr) $$

with Φ the lower triangle, its diagonal halved. Let Ĝ be the lower triangle of Ḡ, off-diagonal
entries doubled. Then

$$ \bar E = (\rho\circ\hat G)^\top K + (\rho\circ\bar H)^\top X + \epsilon\bar F $$
$$ \bar K = (\rho\circ\hat G)E + \alpha^2\bar E P + c\bar E - \alpha\bar V M,\quad
   \bar X = (\rho\circ\bar H)E + 2\bar v(\alpha^2 X P + cX) + \alpha\bar Y M $$
$$ \bar r = \mathrm{diag}\,\bar G,\quad \bar c = k\cdot\bar e + \bar v|x|^2 \;
   (+ \mathrm{tr}\bar P' \text{ at the end}),\quad \bar q_t = \sum_{u\ge t}\rho_{ut}^2\bar c_u $$

Memory scaled up while keys and queries are scaled down by as much changes no reading, so that
⟨M, M̄⟩ + 2⟨P, P̄⟩ moves along the chunk by k·k̄ + x·x̄ a token, and

$$ \bar{\log a_t} = \sum_{u \ge t} (k\cdot\bar k + x\cdot\bar x - 2 q\bar q)_u
   + \langle M', \bar M'\rangle + 2\langle P', \bar P'\rangle. $$

**Restoration.** Where the prediction keeps λ a² P, the mean decays by less than the deviation.
α, ε and ρ are then the mean's, and with δ_ts = λ_{s+1}⋯λ_t (from the chunk's start, to its end)
L, R, B keep their form, e has α²δ in place of α², and N = L⁻¹ comes with N∘δ:

$$ \bar R = \mathrm{tril}(\bar Y W^\top - 2\bar v\,(\delta\circ R)),\quad
   \bar H = \bar R(\delta\circ N),\quad \Theta = (\delta\circ N)^\top W,\quad
   \bar F = \Theta\bar M' - 2\delta_C B\bar P' $$
$$ -2\bar G_{ts} = Q_{ts} + \delta_{ts} Q_{st} + (S B^\top)_{st} + \delta_{ts} (S B^\top)_{ts}
   \;(t \ge s),\quad S = \Theta\bar M' - \delta_C B\bar P' $$
$$ Q = N^\top\bigl(\Phi(\bar W W^\top) + \Phi(\bar R^\top R)^\top + \tfrac{V}{2}\bar\ell\bigr)
   (\delta\circ N) $$

Nothing is divided by λ: every δ is at most 1, and λ = 0 is the reset filter (`kernels.restored` has
λ's own cotangent).

**Across chunks**, with Ψ = α_C − (αK)ᵀB and Λ = Θᵀ(αK),

$$ \bar M = \bar M'\Psi^\top + \text{own},\quad
   \bar P = \mathrm{sym}(\Psi\bar P'\Psi^\top + \Lambda^\top\bar M'\Psi^\top) + \text{own}. $$

What does not depend on M̄' and P̄' is found by `local` for all chunks at once; `recur` then goes
through the chunks of a head from the last to the first with M̄ and P̄ in registers.

**Layout.** A chunk's matrices are 64 × 64. Two warpgroups share the columns of each: an operand
lies whole in shared memory as two bfloat16 pieces, readable as its transpose too, and each
multiplies it by its own 32 columns of another; sums are float32. `local` is as many programs as
there are multiprocessors, `recur` one a head. Between them pass five such matrices a chunk, 1.3 kB
a token. `local` has six places for operands, and its chunk's rows of u, w and Ȳ beside them, which
the copy engine replaces by the next chunk's after their last reading; L's blocks of 16 are inverted
and joined by the warpgroup that has their columns. Keys of 128 make what has a column a key
64 × 128, and P 128 × 128: `local` shares them likewise, but loads rows from global memory, and
`kernels.wide` has the recursion.

`recur` copies what a chunk wants in groups of three or four, each a phase or more ahead: B and Θ in
the chunk before, where M̄ and P̄ lay there until its first products had read them; keys and P at its
start, queries and read-outs' cotangents beside its first products, M beside the next ones. What
goes to registers is loaded before products and used after them.

Source: the derivative of a Cholesky factor, Murray (2016), arXiv 1602.07527; values and gradients
are compared with the filter token by token in tests/test_kernels.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, WIDTH
from .matrices import PIECES, SHARES, Memory, Share, restores


def recur(
    key: Float[Array, "row piece time key"],
    query: Float[Array, "row piece time key"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    found: tuple[Array, ...],
    means: Float[Array, "row chunk piece_of_state value key"],
    covariances: Float[Array, "row chunk piece_of_state key key"],
    of_last_mean: Float[Array, "row value key"],
    of_last_covariance: Float[Array, "row key key"],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> dict[str, Array]:
    """Pass through the chunks from the last to the first.

    Returns:
        Cotangents of `key`, `value` and `query` (row, time, 64), of `noise`, and of c within its
        chunk (`drift`); `moved`, k·k̄ + x·x̄ of every token; at every chunk's start, (row, chunk,
        64), `trace`, the diagonal of P̄, and `scale`, which sums to ⟨M, M̄⟩ + 2⟨P, P̄⟩; M̄ and P̄ before
        the first token, `first_mean` and `first_covariance`. Where covariances are restored also
        what λ's cotangent is found from (`kernels.restored`).
    """
    rows, depth, time, _ = key.shape
    chunks = time // CHUNK
    f32 = jnp.float32
    out = {
        **dict.fromkeys(("key", "value", "query"), ((rows, time, WIDTH), dtype)),
        **dict.fromkeys(("noise", "drift", "moved"), ((rows, SHARES, time), f32)),
        **dict.fromkeys(("trace", "scale"), ((rows, SHARES, chunks, WIDTH), f32)),
        **dict.fromkeys(("first_mean", "first_covariance"), ((rows, WIDTH, WIDTH), f32)),
    }
    if restores(numbers):
        out |= asked_of_kept(rows, time, WIDTH)
    held = "reads", "mean", "covariance", "of_values", "joints", "given", "squares"
    arrivals = {
        "keys_there": depth + PIECES,
        "queries_there": depth + PIECES,
        "mean_there": PIECES,
    }
    scratch = Memory.scratch(depth, numbers, held, arrivals)
    run = mosaic.kernel(
        partial(_recur, chunks=chunks), out, {"row": rows}, scratch, SHARES, interpret
    )
    states = means, covariances, of_last_mean, of_last_covariance
    return joined(run(key, query, of_mean, numbers, *found, *states))


def asked_of_kept(rows: int, time: int, width: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What is left of a restored covariance for λ's cotangent.

    `tied` is Ē; `ends`, P̄' of every chunk in pieces; `entered`, ē·P k + v̄ x·P x with the chunk's
    own P; `through` sums to ⟨P, P̄'⟩.
    """
    f32, chunks = jnp.float32, time // CHUNK
    return {
        "tied": ((rows, time, width), f32),
        "ends": ((rows, chunks, PIECES, width, width), jnp.bfloat16),
        "entered": ((rows, SHARES, time), f32),
        "through": ((rows, SHARES, chunks, width), f32),
    }


def joined(found: dict[str, Array]) -> dict[str, Array]:
    """Sums of which each warpgroup has left its own share."""
    shared = {"noise", "drift", "moved", "trace", "scale", "entered", "through"} & found.keys()
    return found | {name: found[name].sum(axis=1) for name in shared}


def from_last(step, chunks):
    """Of a loop from the last chunk on: its number, the next one's, its tokens, and its slot."""
    c = chunks - 1 - step
    return c, jnp.maximum(c - 1, 0), pl.ds(c * CHUNK, CHUNK), lax.rem(step, 2)


def guide(here, held, work):
    """ΘM̄' and BP̄', work done beside them."""

    def find_spread():
        work()
        return here.times((held.weights, held.of_covariances))

    return here.beside(find_spread, (held.spreads, held.of_means))


def of_start(here, held, work):
    """What a chunk's own tokens ask of M, and twice what they ask of P; work done beside."""

    def find_asked():
        work()
        return here.times(
            (held.keys.T, held.spreads),
            (held.spreads.T, held.keys),
            (held.queries.T, held.squares),
        )

    return here.beside(find_asked, (held.of_values.T, held.keys), (held.given.T, held.queries))


def _recur(*inputs, out, place, chunks, interpret):
    key, query, of_mean, numbers_in, weights_in, spreads_in, reads_in = inputs[:7]
    of_value_in, of_joint_in, means_in, covariances_in = inputs[7:11]
    of_last_mean, of_last_covariance = inputs[11:]
    memory = Memory(place, interpret)
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    own = Share(share, WIDTH // SHARES, interpret)

    memory.number(share == 0, 0, numbers_in.at[row, chunks - 1])
    memory.hand(share == 0, 0, weights_in.at[row, chunks - 1], spreads_in.at[row, chunks - 1])

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c, before, tokens, slot = from_last(step, chunks)
        copies, copies_next = share == 0, jnp.logical_and(share == 0, c > 0)

        def leave(name, matrix):
            ref = out[name]
            ref.at[row, tokens, here.columns][...] = matrix.astype(ref.dtype)

        def leave_sum(name, matrix):
            at = c if len(out[name].shape) == 4 else tokens
            out[name].at[row, share, at][...] = jnp.sum(matrix, axis=1)

        numbers, here, held = memory.enter(slot, share)
        memory.bring(
            copies,
            "keys_there",
            (covariances_in.at[row, c], held.covariance.ref),
            (key.at[row, :, tokens], held.keys.ref),
        )
        fade, added = here.along(numbers.alpha), here.along(numbers.drift)
        since, kept = here.since(numbers), numbers.alpha[CHUNK - 1]
        through = kept * kept
        if numbers.faded is not None:
            through = through * jnp.exp(numbers.faded[CHUNK - 1])
        here.put(held.of_means.ref, of_mean_end)
        here.put(held.of_covariances.ref, of_covariance_end)
        memory.wait("handed")
        held = memory.next_phase(slot)
        if numbers.faded is not None:
            mosaic.copy_out(held.of_covariances.ref.at[share], out["ends"].at[row, c, share])
        of_value = here.load(of_value_in.at[row, c])
        cotangent = here.load(of_mean.at[row, tokens])

        def bring_queries():
            memory.bring(
                copies,
                "queries_there",
                (query.at[row, :, tokens], held.queries.ref),
                (reads_in.at[row, c], held.reads.ref),
            )

        guided, spread = guide(here, held, bring_queries)
        if numbers.faded is not None:
            spread = spread * here.until(numbers)

        def leave_square():
            here.put(held.squares.ref, guided - spread)
            here.put(held.given.ref, fade * cotangent)

        explained, _ = here.beside(leave_square, (held.weights, held.of_means.T))
        of_value = of_value + explained
        leave("value", of_value)
        here.put(held.of_values.ref, -fade * of_value)
        of_tied = here.along(numbers.end) * (guided - 2 * spread)
        held = memory.next_phase(slot)
        of_joint = here.load(of_joint_in.at[row, c])

        def bring_mean():
            memory.bring(copies, "mean_there", (means_in.at[row, c], held.mean.ref))
            memory.number(copies_next, 1 - slot, numbers_in.at[row, before])

        if numbers.faded is None:
            between, _ = here.beside(
                bring_mean, (held.squares, held.weights.T), (held.weights, held.squares.T)
            )
        else:

            def find_between():
                bring_mean()
                lasting = here.lasting(numbers)
                return lasting, here.times((held.weights, held.squares.T))

            between, (lasting, later) = here.beside(find_between, (held.squares, held.weights.T))
            between = lasting * between + later
        memory.wait("keys_there")

        def leave_joint():
            joint = of_joint - here.halved(between) * here.ratios(numbers)
            leave_sum("noise", here.diagonal(joint))
            here.put(held.joints.ref, joint)
            return here.plain(held.keys.ref)

        carried, plain_key = here.beside(leave_joint, (held.keys, held.covariance))
        tied = since * carried + added * plain_key
        if numbers.faded is not None:
            # The next chunk's Θ is copied to where P̄' lies.
            mosaic.wait_out(0, wait_read_only=True)
        held = memory.next_phase(slot)
        memory.wait("queries_there")

        def leave_tied():
            following = weights_in.at[row, before], spreads_in.at[row, before]
            memory.hand(copies_next, 1 - slot, *following)
            here.put(held.weights.ref, tied)
            return here.plain(held.queries.ref)

        asked, plain_query = here.beside(
            leave_tied, (held.joints.T, held.keys), (held.reads.T, held.queries)
        )
        of_tied = of_tied + asked
        of_read_variance = here.along(numbers.of_variance)

        def leave_asked():
            leave_sum("drift", plain_key * of_tied + of_read_variance * plain_query * plain_query)
            here.put(held.spreads.ref, since * of_tied)
            here.put(held.squares.ref, 2 * since * of_read_variance * plain_query)

        seen, _ = here.beside(leave_asked, (held.queries, held.covariance))
        if numbers.faded is not None:
            leave("tied", of_tied)
            leave_sum("entered", carried * of_tied + of_read_variance * seen * plain_query)
        unread = since * seen + added * plain_query
        held = memory.next_phase(slot)

        def foresee():
            values, joints = (ref.at[row, before] for ref in (of_value_in, of_joint_in))
            memory.foresee(copies, values, joints, of_mean.at[row, pl.ds(before * CHUNK, CHUNK)])

        of_mean_start, doubled = of_start(here, held, foresee)
        of_mean_start = kept * of_mean_end + of_mean_start
        memory.wait("mean_there")

        def find_start():
            of_covariance_start = through * of_covariance_end + 0.5 * doubled
            scale = here.plain(held.mean.ref) * of_mean_start
            covariance = here.plain(held.covariance.ref)
            leave_sum("scale", scale + 2 * covariance * of_covariance_start)
            if numbers.faded is not None:
                leave_sum("through", covariance * of_covariance_end)
            leave_sum("trace", here.diagonal(of_covariance_start))
            return of_covariance_start

        of_key, of_covariance_start = here.beside(
            find_start,
            (held.joints, held.weights),
            (held.spreads, held.covariance),
            (held.of_values, held.mean),
        )

        def leave_key():
            whole = added * of_tied + of_key
            leave("key", whole)
            return plain_key * whole

        of_query, moved = here.beside(
            leave_key, (held.reads, held.weights), (held.given, held.mean)
        )
        of_query = 2 * of_read_variance * unread + of_query
        leave("query", of_query)
        leave_sum("moved", moved + plain_query * of_query)
        memory.meet()
        return of_mean_start, of_covariance_start

    start = own.load(of_last_mean.at[row]), own.load(of_last_covariance.at[row])
    first_mean, first_covariance = lax.fori_loop(0, chunks, chunk, start)
    out["first_mean"].at[row, :, own.columns][...] = first_mean
    out["first_covariance"].at[row, :, own.columns][...] = first_covariance
