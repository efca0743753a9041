"""The gradient's recursion across chunks (`kernels.reverse`) for keys of 128.

**Layout.** Two warpgroups hold half of the columns of M̄ (64 × 128) and P̄ (128 × 128) each: 96
registers a thread. Addresses are found anew in every phase: kept, they would be spilled, 1500 bytes
a thread instead of 500. What a chunk needs as operands would take 400 kB of shared memory in
float32, two bfloat16 pieces each, so that five places are used more than once:

| place | kB | holds in turn |
|---|---|---|
| `weights` | 32 | B; half of α² Ē |
| `squares` | 64 | P̄; what B̄ amounts to; P; E and α² v̄ X |
| `states` | 32 | M̄; M |
| `small` | 16 | Θ; Ḡ; −α V̄ |
| `reads` | 16 | cotangent of read-outs times ρ; α Ȳ |

beside 64 kB for keys and queries, 32 in bfloat16, which are copied beside a chunk's first product.
States are copied once their places are free.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, WIDTH
from .matrices import PIECES, SHARES, SQUARE, Pieces, Share, numbers_of, opaque_zero, restores
from .reverse import asked_of_kept, joined

_NUMBERS = 8
"""Numbers a token that there is room for; a ninth, of a restoration, takes the last one's place,
which nothing reads here."""


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
    """Pass through the chunks from the last to the first; what `reverse.recur` returns."""
    rows, depth, time, width = key.shape
    chunks = time // CHUNK
    f32 = jnp.float32
    out = {
        **dict.fromkeys(("key", "query"), ((rows, time, width), dtype)),
        "value": ((rows, time, WIDTH), dtype),
        **dict.fromkeys(("noise", "drift", "moved"), ((rows, SHARES, time), f32)),
        "trace": ((rows, SHARES, chunks, width), f32),
        "scale": ((rows, SHARES, chunks, width + WIDTH), f32),
        "first_mean": ((rows, WIDTH, width), f32),
        "first_covariance": ((rows, width, width), f32),
    }
    if restores(numbers):
        out |= asked_of_kept(rows, time, width)
    form = mosaic.operands_of(WIDTH // SHARES)

    def operand(depth, *shape):
        return mosaic.SMEM((1, depth, *shape), jnp.bfloat16, transforms=form)

    scratch = {
        "keys": operand(depth, CHUNK, width),
        "queries": operand(depth, CHUNK, width),
        "weights": operand(PIECES, CHUNK, width),
        "squares": operand(PIECES, width, width),
        "states": operand(PIECES, WIDTH, width),
        "small": operand(PIECES, *SQUARE),
        "reads": operand(PIECES, *SQUARE),
        "vectors": mosaic.SMEM((1, _NUMBERS, CHUNK), f32),
        "handed": mosaic.barrier(num_arrivals=1 + restores(numbers) + 2 * PIECES),
        "arrived": mosaic.barrier(num_arrivals=2 * depth + PIECES),
        "mean_there": mosaic.barrier(num_arrivals=PIECES),
        "covariance_there": mosaic.barrier(num_arrivals=PIECES),
        "met": mosaic.barrier(num_arrivals=SHARES),
    }
    run = mosaic.kernel(
        partial(_recur, chunks=chunks),
        out,
        {"row": rows},
        scratch,
        SHARES,
        interpret,
        reduction_bytes=0,
    )
    states = means, covariances, of_last_mean, of_last_covariance
    return joined(run(key, query, of_mean, numbers, *found, *states))


def _recur(*inputs, out, place, chunks, interpret):
    key, query, of_mean, numbers_in, weights_in, explained_in, reads_in = inputs[:7]
    of_value_in, of_joint_in, means, covariances, of_last_mean, of_last_covariance = inputs[7:]
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    width, restored = key.shape[-1], "tied" in out
    broad = Share(share, width // SHARES, interpret)

    def find():
        """Operands, whose addresses the compiler finds anew: kept, they would be spilled."""
        only = opaque_zero(place["vectors"], 0)
        found = {name: Pieces(place[name].at[only]) for name in tuple(place)[:7]}
        halves = [Pieces(found["squares"].ref.at[:, pl.ds(at, CHUNK)]) for at in (0, CHUNK)]
        return SimpleNamespace(**found, upper=halves[0], lower=halves[1])

    def meet():
        mosaic.meet(place["met"], interpret)

    def next_phase():
        meet()
        return find()

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c = chunks - 1 - step
        tokens = pl.ds(c * CHUNK, CHUNK)

        def bring(target, source, barrier):
            for piece in range(PIECES):
                mosaic.copy_in(source.at[row, c, piece], place[target].at[0, piece], place[barrier])

        def leave(name, matrix, share):
            ref = out[name]
            ref.at[row, tokens, share.columns][...] = matrix.astype(ref.dtype)

        def leave_sum(name, matrix, *at):
            at = at or (tokens,)
            out[name].at[(row, share, *at)][...] = jnp.sum(matrix, axis=1)

        @pl.when(share == 0)
        def _():
            first = pl.ds(0, _NUMBERS - restored)
            source, target = numbers_in.at[row, c], place["vectors"].at[0]
            mosaic.copy_in(source.at[first], target.at[first], place["handed"])
            if restored:
                mosaic.copy_in(source.at[_NUMBERS], target.at[_NUMBERS - 1], place["handed"])
            bring("weights", weights_in, "handed")
            bring("small", explained_in, "handed")

        mosaic.barrier_wait(place["handed"])
        numbers = numbers_of(place["vectors"].at[0])
        if restored:
            numbers = numbers._replace(faded=numbers.inverse_deviation)
        kept = numbers.alpha[CHUNK - 1]
        through = kept * kept
        if numbers.faded is not None:
            through = through * jnp.exp(numbers.faded[CHUNK - 1])
        # Indices too: what is known of diagonals would be kept from before the loop.
        anew = partial(Share, share + opaque_zero(place["vectors"], 0), interpret=interpret)
        small, square = anew(WIDTH // SHARES), anew(width // SHARES, rows=width)
        here = find()
        broad.put(here.states.ref, of_mean_end)
        square.put(here.squares.ref, of_covariance_end)
        here = next_phase()
        if numbers.faded is not None:
            mosaic.copy_out(here.squares.ref.at[share], out["ends"].at[row, c, share])

        def bring_tokens():
            @pl.when(share == 0)
            def _():
                bring("reads", reads_in, "arrived")
                for source, target in ((key, "keys"), (query, "queries")):
                    for piece in range(source.shape[1]):
                        from_, to = source.at[row, piece, tokens], place[target].at[0, piece]
                        mosaic.copy_in(from_, to, place["arrived"])

        guided, _ = broad.beside(bring_tokens, (here.small, here.states))
        spread = broad.times((here.weights, here.squares))
        if numbers.faded is not None:
            spread = spread * broad.until(numbers)
        of_value = small.load(of_value_in.at[row, c]) + small.times((here.weights, here.states.T))
        leave("value", of_value, small)
        of_tied = broad.along(numbers.end) * (guided - 2 * spread)
        if numbers.faded is not None:
            mosaic.wait_out(0, wait_read_only=True)
        here = next_phase()

        @pl.when(share == 0)
        def _():
            bring("states", means, "mean_there")

        broad.put(here.upper.ref, guided - spread)
        here = next_phase()
        if numbers.faded is None:
            between = small.times((here.upper, here.weights.T), (here.weights, here.upper.T))
        else:
            between = small.lasting(numbers) * small.times((here.upper, here.weights.T))
            between = between + small.times((here.weights, here.upper.T))
        joint = small.load(of_joint_in.at[row, c]) - small.halved(between) * small.ratios(numbers)
        leave_sum("noise", small.diagonal(joint))
        small.put(here.small.ref, joint)
        here = next_phase()

        @pl.when(share == 0)
        def _():
            bring("squares", covariances, "covariance_there")

        mosaic.barrier_wait(place["arrived"])
        of_tied = of_tied + broad.times((here.small.T, here.keys), (here.reads.T, here.queries))
        since, added = broad.since(numbers), broad.along(numbers.drift)
        of_variance = broad.along(numbers.of_variance)
        plain_query = broad.plain(here.queries.ref)
        asked = broad.plain(here.keys.ref) * of_tied + of_variance * plain_query * plain_query
        leave_sum("drift", asked)
        broad.put(here.weights.ref, 0.5 * since * of_tied)
        mosaic.barrier_wait(place["covariance_there"])
        here = next_phase()
        of_key = added * of_tied + 2 * broad.times((here.weights, here.squares))
        carried = broad.times((here.keys, here.squares))
        tied = since * carried + added * broad.plain(here.keys.ref)
        seen = broad.times((here.queries, here.squares))
        plain_query = broad.plain(here.queries.ref)
        if numbers.faded is not None:
            leave("tied", of_tied, broad)
            leave_sum("entered", carried * of_tied + of_variance * seen * plain_query)
        of_query = 2 * of_variance * (since * seen + added * plain_query)
        here = next_phase()
        broad.put(here.upper.ref, tied)
        broad.put(here.lower.ref, since * of_variance * broad.plain(here.queries.ref))
        here = next_phase()
        of_key = of_key + broad.times((here.small, here.upper))
        of_query = of_query + broad.times((here.reads, here.upper))

        @pl.when(share == 0)
        def _():
            before = jnp.maximum(c - 1, 0)
            for ref in (weights_in, explained_in, of_value_in, of_joint_in, covariances):
                mosaic.prefetch(ref.at[row, before], interpret)
            mosaic.prefetch(of_mean.at[row, pl.ds(before * CHUNK, CHUNK)], interpret)

        here = next_phase()
        weakened = small.along(numbers.alpha)
        small.put(here.small.ref, -weakened * of_value)
        small.put(here.reads.ref, weakened * small.load(of_mean.at[row, tokens]))
        mosaic.barrier_wait(place["mean_there"])
        here = next_phase()
        of_key = of_key + broad.times((here.small, here.states))
        of_query = of_query + broad.times((here.reads, here.states))
        leave("key", of_key, broad)
        leave("query", of_query, broad)
        moved = broad.plain(here.keys.ref) * of_key + broad.plain(here.queries.ref) * of_query
        leave_sum("moved", moved)
        of_mean_start = broad.times((here.small.T, here.keys), (here.reads.T, here.queries))
        of_mean_start = kept * of_mean_end + of_mean_start
        scale = broad.plain(here.states.ref) * of_mean_start
        leave_sum("scale", scale, c, pl.ds(width, WIDTH))
        crossed = (here.keys.T, here.weights), (here.weights.T, here.keys)
        of_covariance_start = square.times(*crossed, (here.queries.T, here.lower))
        of_covariance_start = through * of_covariance_end + of_covariance_start
        covariance = square.plain(covariances.at[row, c])
        leave_sum("scale", 2 * covariance * of_covariance_start, c, pl.ds(0, width))
        if numbers.faded is not None:
            leave_sum("through", covariance * of_covariance_end, c)
        leave_sum("trace", square.diagonal(of_covariance_start), c)
        meet()
        return of_mean_start, of_covariance_start

    start = broad.load(of_last_mean.at[row]), broad.load(of_last_covariance.at[row])
    first_mean, first_covariance = lax.fori_loop(0, chunks, chunk, start)
    out["first_mean"].at[row, :, broad.columns][...] = first_mean
    out["first_covariance"].at[row, :, broad.columns][...] = first_covariance
