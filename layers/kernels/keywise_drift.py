r"""What a chunk's own drift is asked for with rates per key, by threads that own a key.

No ratio is kept: sums are found by Horner's rule, Σ_s ρ_ts W_ts d_s going from h to
a_s h + W_ts d_s, and Σ_t ρ_ts W_ts k_t from g to a_t (g + W_ts k_t). There W is Ĝ, of which a
chunk's drift makes k_t diag(ρ_ts) d_s with d = c∘k, and H̄, with queries for keys:

$$ \bar E_s = \sum_{t\ge s} \rho_{ts}\circ(\hat G_{ts} k_t + \bar H_{ts} x_t)
   + \epsilon_s\circ\bar F_s $$
$$ \bar k_t = \alpha_t\circ\bar{\tilde k}_t + \sum_{s\le t} \hat G_{ts}\,\rho_{ts}\circ d_s
   + c_t\circ\bar E_t,\quad
   \bar x_t = \alpha_t\circ\bar{\tilde x}_t + \sum_{s\le t} \bar H_{ts}\,\rho_{ts}\circ d_s
   + 2\bar v_t c_t\circ x_t $$
$$ \bar q_t = k_t\circ\bar E_t + \bar v_t x_t^2 + a_{t+1}^2\circ\bar q_{t+1},\quad
   \overline{\log a}_t = \text{end} + \sum_{u\ge t} (k\circ\bar k + x\circ\bar x
   - 2 q\circ\bar q)_u $$

where q̄ ends as the diagonal of P̄', and the last as M'∘M̄' + 2 P'∘P̄' summed for each key: a key's
memory scaled up while its keys and queries are scaled down by as much changes no reading.

**Bytes** a token: 2.6 kB read and 1 written.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .covariance import CHUNK
from .keywise_ratios import Rows, Tokens
from .matrices import SHARES
from .mosaic import BLOCK
from .threads import Threads


def of_drift(
    tokens: Tokens,
    decay: Rows,
    added: Rows,
    of_variance: Float[Array, "row time"],
    weights: Float[Array, "row chunk two token token"],
    of_tokens: Tokens,
    of_end: Rows,
    of_last: Float[Array, "row chunk two key"],
    *,
    interpret: bool = False,
) -> tuple[Tokens, Float[Array, "row two time key"]]:
    """Cotangents of keys and queries, and of added variances and log decays.

    Args:
        tokens: keys and queries.
        decay: a; 0 where a document starts.
        added: q.
        of_variance: cotangent of variances of read-outs.
        weights: Ĝ and H̄.
        of_tokens: cotangents of k̃ and x̃, but for the chunk's own drift.
        of_end: F̄.
        of_last: what q̄ and the cotangents of log decays end as.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, _, time, width = tokens.shape
    chunks, f32 = time // CHUNK, jnp.float32
    both, square = mosaic.SMEM((2, CHUNK, width), f32), mosaic.SMEM((CHUNK, width), f32)
    run = mosaic.kernel(
        _of_drift,
        dict.fromkeys(("tokens", "rates"), (tokens.shape, f32)),
        {"row": rows, "chunk": chunks},
        {
            **dict.fromkeys(("tokens", "weights", "asked", "tied"), both),
            **dict.fromkeys(("decays", "drifts", "added"), square),
            "of_variances": mosaic.SMEM((CHUNK,), f32),
            "arrived": mosaic.barrier(num_arrivals=7),
            "met": mosaic.barrier(num_arrivals=SHARES),
        },
        SHARES,
        interpret,
        reduction_bytes=0,
    )
    found = run(tokens, decay, added, of_variance, weights, of_tokens, of_end, of_last)
    return found["tokens"], found["rates"]


def _of_drift(*inputs, out, place, interpret):
    tokens_in, decay_in, added_in, of_variance_in, weights_in = inputs[:5]
    of_tokens_in, of_end_in, of_last_in = inputs[5:]
    tokens, weights, asked, tied, decays, drifts, added, of_variances, arrived, met = place.values()
    row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
    share = lax.axis_index("wg")
    thread = Threads(interpret)
    first = chunk * CHUNK
    own = pl.ds(first, CHUNK)
    zero, one = thread.number(0.0), thread.number(1.0)

    @pl.when(share == 0)
    def _():
        mosaic.copy_in(decay_in.at[row, own], decays, arrived)
        mosaic.copy_in(of_variance_in.at[row, own], of_variances, arrived)
        mosaic.copy_in(weights_in.at[row, chunk], weights, arrived)
        mosaic.copy_in(tokens_in.at[row, :, own], tokens, arrived)
        mosaic.copy_in(added_in.at[row, own], added, arrived)
        mosaic.copy_in(of_tokens_in.at[row, :, own], asked, arrived)
        mosaic.copy_in(of_end_in.at[row, own], tied.at[0], arrived)

    mosaic.barrier_wait(arrived)

    @pl.when(share == 0)
    def _ask():
        def token(t, carry):
            alpha, drift = carry
            decay, place = thread.row(decays.at[t]), asked.at[:, t]
            alpha, drift = alpha * decay, decay * decay * drift + thread.row(added.at[t])
            thread.put_row(drifts.at[t], drift)
            thread.put(place, alpha * thread.halves(place))
            return alpha, drift

        lax.fori_loop(0, CHUNK, token, (one, zero))

        def drawn(s):
            return thread.row(decays.at[s]), thread.row(drifts.at[s]) * thread.row(tokens.at[0, s])

        def block(index, carry):
            start = index * BLOCK

            def earlier(step, found):
                rates = [drawn(4 * step + n) for n in range(4)]
                found = list(found)
                for t in range(BLOCK):
                    entries = thread.spread(weights.at[:, start + t, pl.ds(4 * step, 4)])
                    for entry, (decay, drift) in zip(entries, rates, strict=True):
                        found[t] = decay * found[t] + entry * drift
                return tuple(found)

            found = list(lax.fori_loop(0, start // 4, earlier, (zero,) * BLOCK))
            rates = [drawn(start + s) for s in range(BLOCK)]
            for t in range(BLOCK):
                entries = thread.spread(weights.at[:, start + t, pl.ds(start, BLOCK)])
                for s in range(t + 1):
                    decay, drift = rates[s]
                    found[t] = decay * found[t] + entries[s] * drift
                place = asked.at[:, start + t]
                thread.put(place, thread.halves(place) + found[t])
            return carry

        lax.fori_loop(0, CHUNK // BLOCK, block, None)

    @pl.when(share == 1)
    def _tie():
        def block(index, carry):
            start = index * BLOCK

            def entries_of(t):
                return thread.spread(weights.at[:, t, pl.ds(start, BLOCK)])

            def later(step, found):
                t = CHUNK - 1 - step
                decay, told = thread.row(decays.at[t]), thread.halves(tokens.at[:, t])
                return tuple(
                    decay * (g + entry * told)
                    for g, entry in zip(found, entries_of(t), strict=True)
                )

            ends = (thread.row(tied.at[0, start + s]) for s in range(BLOCK))
            found = tuple(thread.own(end, zero) for end in ends)
            found = list(lax.fori_loop(0, CHUNK - BLOCK - start, later, found))
            for n in reversed(range(BLOCK)):
                t = start + n
                decay, told = thread.row(decays.at[t]), thread.halves(tokens.at[:, t])
                entries = entries_of(t)
                for s in range(n):
                    found[s] = decay * (found[s] + entries[s] * told)
                thread.put(tied.at[:, t], found[n] + entries[n] * told)
            return carry

        lax.fori_loop(0, CHUNK // BLOCK, block, None)

    mosaic.meet(met, interpret)

    # Tokens in turn to either warpgroup.
    def gather(step, carry):
        t = 2 * step + share
        key, query = (thread.row(tokens.at[n, t]) for n in range(2))
        whole = thread.row(tied.at[0, t]) + thread.row(tied.at[1, t])
        drift, read = thread.row(drifts.at[t]), of_variances[t] * query
        of_key = thread.row(asked.at[0, t]) + drift * whole
        of_query = thread.row(asked.at[1, t]) + 2 * drift * read
        thread.put(out["tokens"].at[row, :, first + t], thread.own(of_key, of_query))
        moved = key * of_key + query * of_query
        thread.put(weights.at[:, t], thread.own(key * whole + read * query, moved))
        return carry

    lax.fori_loop(0, CHUNK // 2, gather, None)
    mosaic.meet(met, interpret)

    @pl.when(share == 0)
    def _rates():
        def token(step, carry):
            entering, of_decay = carry
            t = CHUNK - 1 - step
            decay = thread.row(decays.at[t])
            of_added = thread.row(weights.at[0, t]) + entering
            own = 2 * thread.row(added.at[t]) * of_added
            of_decay = of_decay + thread.row(weights.at[1, t]) - own
            thread.put(out["rates"].at[row, :, first + t], thread.own(of_added, of_decay))
            return decay * decay * of_added, of_decay

        last = (thread.row(of_last_in.at[row, chunk, n]) for n in range(2))
        lax.fori_loop(0, CHUNK, token, tuple(last))
