"""What each chunk asks of its tokens by itself, all chunks at once (`kernels.reverse`)."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import elimination, mosaic
from .forward import CHUNK, WIDTH
from .matrices import (
    PIECES,
    SHARES,
    SQUARE,
    Pieces,
    Share,
    numbers_of,
    opaque_zero,
    restores,
)
from .mosaic import BLOCK


def local(
    key: Float[Array, "row piece time key"],
    query: Float[Array, "row piece time key"],
    whitened: Float[Array, "row time both"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    *,
    values: int = WIDTH,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """What each chunk asks of its tokens, the states' cotangents aside.

    Args:
        key: in pieces, as are queries.
        query: in pieces.
        whitened: as the forward pass left it.
        of_mean: cotangent of read-outs.
        numbers: of every token (`Numbers`).
        values: how many of a token's values are seen.
        interpret: whether to run the kernel's simulation on a CPU.

    Returns:
        B, Θ and the cotangent of read-outs times ρ in pieces (row, chunk, piece, 64, 64 or key);
        what readings ask of values and of the joint covariance (the lower triangle, times ρ) in
        float32 (row, chunk, 64, 64).
    """
    return _run((key, query), whitened, of_mean, numbers, values, interpret)


def local_of_factors(
    factors: Float[Array, "row chunk two token token"],
    moved: Float[Array, "row time both"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    *,
    values: int = WIDTH,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """The same, where rates are per key: nothing found is then multiplied by ratios.

    Args:
        factors: L, of which the diagonal is not read, and R.
        moved: ε∘U and W.
        of_mean: cotangent of read-outs.
        numbers: of every token.
        values: how many of a token's values are seen.
        interpret: whether to run the kernel's simulation on a CPU.
    """
    return _run((factors, factors), moved, of_mean, numbers, values, interpret)


def _run(sources, whitened, of_mean, numbers, values: int, interpret: bool) -> tuple[Array, ...]:
    rows, time = whitened.shape[:2]
    width = whitened.shape[-1] - WIDTH
    factored = sources[0].dtype == jnp.float32
    depth = 1 if factored else sources[0].shape[1]
    chunks = time // CHUNK
    wide = width > WIDTH
    broad = CHUNK, width

    def pieced(shape):
        return (rows, chunks, PIECES, *shape), jnp.bfloat16

    out = {
        "weights": pieced(broad),
        **dict.fromkeys(("explained", "of_read"), pieced(SQUARE)),
        **dict.fromkeys(("of_value", "of_joint"), ((rows, chunks, *SQUARE), jnp.float32)),
    }
    parts = max(1, min(chunks, mosaic.PROCESSORS // rows))
    form = mosaic.operands_of(WIDTH // SHARES)
    operand = mosaic.SMEM((1, PIECES, *SQUARE), jnp.bfloat16, transforms=form)
    moved = mosaic.SMEM((1, PIECES, *broad), jnp.bfloat16, transforms=form)
    given = mosaic.SMEM((1, depth, *broad), jnp.bfloat16, transforms=form)
    if factored:
        given = mosaic.SMEM((1, 1, *SQUARE), jnp.float32, transforms=mosaic.ENTRIES)
    told = {
        name: mosaic.SMEM((CHUNK, columns), jnp.float32, transforms=mosaic.ENTRIES)
        for name, columns in ({} if wide else {"rows": width + WIDTH, "asked": WIDTH}).items()
    }
    scratch = {
        **dict.fromkeys(("keys", "queries"), given),
        "vectors": mosaic.SMEM((2, *numbers.shape[2:]), jnp.float32),
        "blocks": mosaic.SMEM((CHUNK, WIDTH + 4), jnp.float32),
        "arrived": mosaic.barrier(num_arrivals=1 + 2 * depth + len(told)),
        "met": mosaic.barrier(num_arrivals=SHARES),
        "moved": moved,
        **dict.fromkeys(("a", "b", "c", "d", "f"), operand),
        **({"lasting": operand} if restores(numbers) else {}),
        **told,
    }
    run = mosaic.kernel(
        partial(_local, chunks=chunks, parts=parts, values=values),
        out,
        {"row": rows, "part": parts},
        scratch,
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    return tuple(run(*sources, whitened, of_mean, numbers).values())


def _local(
    first, second, whitened, of_mean, numbers_in, *, out, place, chunks, parts, values, interpret
):
    row, part = lax.axis_index("row"), lax.axis_index("part")
    share = lax.axis_index("wg")
    here = Share(share, WIDTH // SHARES, interpret)
    keys_in, queries_in, vectors, blocks, arrived, met = tuple(place.values())[:6]
    operands = [place[name] for name in ("moved", "a", "b", "c", "d", "f")]
    width = keys_in.shape[-1]
    wide, factored = width > WIDTH, keys_in.dtype == jnp.float32
    # Rows of the next chunk are copied to shared memory where it has room for them.
    told = [] if wide else [place["rows"], place["asked"]]
    # A share of what has a column a key.
    broad = Share(share, width // SHARES, interpret) if wide else here

    def meet():
        mosaic.meet(met, interpret)

    def at(step):
        # The last program may find its last chunk twice.
        return jnp.minimum(part + step * parts, chunks - 1)

    def tokens_of(chunk):
        return row, pl.ds(chunk * CHUNK, CHUNK)

    def fetch(chunk, slot):
        mosaic.copy_in(numbers_in.at[row, chunk], vectors.at[slot], arrived)
        for which, (source, target) in enumerate(((first, keys_in), (second, queries_in))):
            for piece in range(target.shape[1]):
                tokens = row, piece, pl.ds(chunk * CHUNK, CHUNK)
                part = source.at[(row, chunk, which) if factored else tokens]
                mosaic.copy_in(part, target.at[0, piece], arrived)

    def tell(chunk, which):
        source = (whitened, of_mean)[which].at[tokens_of(chunk)]
        if told:
            mosaic.copy_in(source, told[which], arrived)
        else:
            mosaic.prefetch(source, interpret)

    @pl.when(share == 0)
    def _():
        fetch(at(0), 0)
        tell(at(0), 0)
        tell(at(0), 1)

    def through_chunk(step, carry):
        chunk, slot = at(step), lax.rem(step, 2)

        def leave(ref, matrix):
            ref.at[row, chunk, :, here.columns][...] = matrix

        def before_next(work):
            pl.when(jnp.logical_and(share == 0, step + 1 < steps))(work)

        rows, asked = told or (ref.at[tokens_of(chunk)] for ref in (whitened, of_mean))

        def surprises():
            return mosaic.load(rows.at[:, pl.ds(width + here.first, WIDTH // SHARES)])

        def wait_for_outputs():
            # What the chunk before left is being read until then.
            mosaic.wait_out(0, wait_read_only=True)

        mosaic.barrier_wait(arrived)
        numbers = numbers_of(vectors.at[slot])
        only = opaque_zero(vectors, slot)
        found = [ref.at[only] for ref in (keys_in, queries_in, *operands)]
        keys, queries, moved_by, a, b, c, d, f = map(Pieces, found)
        # Each place holds in turn: a, R̄ and ρ∘H̄; b, W, what joins blocks of 16, L⁻¹; c, W̄ and B;
        # d, R, inverses of blocks of 32, L⁻ᵀ times what is within, Θ; e, U, inverses of blocks of
        # 16, what joins those of 32, εU; f, Ȳ, L, what is within Ḡ, W. Where L and R are given they
        # are in place of keys and queries, and εU in that of U.
        e = Pieces(moved_by.ref.at[:, :, :WIDTH]) if wide else moved_by
        # L⁻¹ with λ besides, where covariances are restored.
        lasting = Pieces(place["lasting"].at[only]) if "lasting" in place else b
        weights = moved_by if wide else c
        if wide:
            wait_for_outputs()
            meet()
        if not factored:
            broad.put(moved_by.ref, broad.load(rows))
        here.put(b.ref, surprises())
        here.put(f.ref, here.load(asked))
        if not wide:
            wait_for_outputs()
        meet()

        def invert_blocks(factor):
            blocks.at[:, here.columns][...] = factor
            elimination.invert_blocks(blocks, numbers.inverse_deviation, here.first, interpret)

        if factored:
            invert_blocks(here.load(keys.ref.at[0]))
            read = here.load(queries.ref.at[0])
        else:
            factor, ratios = here.beside(lambda: here.ratios(numbers), (keys, moved_by.T))
            factor = factor * ratios
            read, _ = here.beside(lambda: invert_blocks(factor), (queries, moved_by.T))
            read = read * ratios
        here.put(d.ref, read)
        meet()

        @before_next
        def _():
            fetch(at(step + 1), 1 - slot)
            tell(at(step + 1), 1)

        apart = jnp.bitwise_xor(here.i, here.j)

        def inverses():
            # Of blocks of 16.
            found = mosaic.load(blocks.at[:, here.columns])
            return jnp.where(apart < BLOCK, found, jnp.zeros_like(found))

        def put_inverses():
            here.put(e.ref, inverses())
            return here.along(numbers.of_evidence) * surprises()

        of_surprise, less = here.beside(put_inverses, (d.T, f))

        def put_of_surprise():
            here.put(c.ref, of_surprise - less)
            lasting_read = read if numbers.faded is None else read * here.lasting(numbers)
            return 2 * here.along(numbers.of_variance) * lasting_read

        of_read, less = here.beside(put_of_surprise, (f, b.T))
        here.put(a.ref, here.lower(of_read - less))
        meet()

        def put_factor():
            # Its blocks of 16 are not read.
            here.put(f.ref, mosaic.load(blocks.at[:, here.columns]))

        if numbers.faded is None:
            inner, _ = here.beside(put_factor, (c, b.T), (a.T, d))
            inner = here.halved(inner)
        else:
            inner, _ = here.beside(put_factor, (c, b.T))
            inner = here.halved(inner) + here.halved_above(here.times((d.T, a)))
        inner = inner + here.diagonal(here.along(numbers.of_evidence)) * (values / 2)
        meet()

        def join(inverse, size, joined, crossed, between, wait):
            joining = jnp.logical_and(apart >= size, apart < 2 * size)
            joining = jnp.logical_and(joining, here.i > here.j)
            product = here.within(here.columns, f, joined)
            here.put(crossed.ref, jnp.where(joining, product, jnp.zeros_like(product)))
            wait()
            return inverse - here.within(between, joined, crossed)

        # Until the last product all that is read lies in own columns.
        inverse = join(inverses(), BLOCK, e, b, here.columns, mosaic.commit_smem)
        here.put(d.ref, inverse)
        mosaic.commit_smem()
        last = pl.ds(CHUNK // 2, CHUNK // 2)
        inverse = join(inverse, 2 * BLOCK, d, e, last, meet)
        here.put(b.ref, inverse)
        if numbers.faded is not None:
            here.put(lasting.ref, inverse * here.lasting(numbers))
        here.put(f.ref, inner)
        meet()

        def put_faded():
            moved = broad.load(rows)
            broad.put(moved_by.ref, moved if factored else broad.along(numbers.end) * moved)
            return surprises()

        both = ((b.T, f), (b.T, f.T)) if numbers.faded is None else ((b.T, f),)
        inner, surprise = here.beside(put_faded, *both)
        here.put(d.ref, inner)
        meet()

        @before_next
        def _():
            tell(at(step + 1), 0)

        def put_surprise():
            here.put(f.ref, surprise)
            return None if factored else here.ratios(numbers)

        # Ḡ is minus half the product, and its lower triangle off the diagonal counts twice.
        of_joint, ratios = here.beside(put_surprise, (d, lasting))
        if numbers.faded is not None:
            crossed = here.times((lasting.T, d.T))
            of_joint = of_joint + here.lasting(numbers) * crossed

        def decayed(square):
            return square if factored else square * ratios

        def leave_joint():
            leave(out["of_joint"], decayed(-here.halved(of_joint)))

        of_read, _ = here.beside(leave_joint, (a, lasting))
        of_read = decayed(of_read)
        of_value = here.times((b.T, c))
        weight, _ = broad.beside(lambda: leave(out["of_value"], of_value), (b.T, moved_by))
        meet()

        def put_outputs():
            here.put(a.ref, of_read)
            broad.put(weights.ref, weight)

        explained, _ = here.beside(put_outputs, (lasting.T, f))
        here.put(d.ref, explained)
        meet()

        for name, operand in (("weights", weights), ("explained", d), ("of_read", a)):
            mosaic.copy_out(operand.ref.at[share], out[name].at[row, chunk, share])
        return carry

    steps = -(-chunks // parts)
    lax.fori_loop(0, steps, through_chunk, None)
    mosaic.wait_out(0)
