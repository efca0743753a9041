r"""The cotangent of a restoration's λ, from what the gradient's recursion leaves.

λ_t multiplies a_t² P_{t−1} in the predicted covariance, whose cotangent is that of what the tokens
from t on see: with the chunk's own P, U and Ē (`kernels.reverse`), α and ρ the mean's decays,

$$ \bar\lambda_t = \langle \bar P^-_t, a_t^2 P_{t-1}\rangle
   = \bar q_t a_t^2 c_{t-1} + \sum_{s < t \le u} \Bigl(\prod_{r=t+1}^{u}\lambda_r\Bigr) T_{us}
     \Bigl(\prod_{r=s+1}^{t-1}\lambda_r\Bigr),\quad
   T_{us} = -\rho_{us}^2 \bigl(k_u^\top u_s\, \bar e_u^\top u_s + \bar v_u (x_u^\top u_s)^2\bigr) $$

where s is also the chunk's start, T_u = α_u² (ē_u·P k_u + v̄_u x_u·P x_u), and u also its end,
T_s = −ε_s² u_s·P̄' u_s, and ⟨P, P̄'⟩ α_C² from the start to the end. Nothing is divided by λ, so that
λ = 0 has its derivative.

The sum over pairs of a chunk's tokens and u_s·P̄' u_s are found by `asked`, for all chunks at once;
what has one token and the chunk's start or end, by XLA from numbers a token.

**Layout.** As in `kernels.local` two warpgroups share the columns of a chunk's matrices. Left
operands Ē and the later λ come from registers, and of T each warpgroup reads its own columns alone.
So they meet once a chunk, after which the next one's arrays are copied to where those of the last
have lain. Keys of 128 have room for one chunk, load rows from global memory, and meet twice.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .blocks import kept_within
from .forward import CHUNK, WIDTH
from .matrices import PIECES, SHARES, SQUARE, Numbers, Pieces, Share, opaque_zero
from .mosaic import pairs, pieces

_NUMBERS = "total", "of_variance", "document", "faded", "before"
"""Numbers a token; the last is log λ, summed until the token before. `document` is where
`opaque_zero` looks for a number that is never negative."""


def asked(
    key: Float[Array, "row piece time key"],
    query: Float[Array, "row piece time key"],
    whitened: Float[Array, "row time both"],
    tied: Float[Array, "row time key"],
    ends: Float[Array, "row chunk piece_of_state key key"],
    numbers: Float[Array, "row chunk number token"],
    *,
    interpret: bool = False,
) -> dict[str, Array]:
    """What pairs of its chunk's tokens ask of each token's λ (`between`), and u·P̄' u (`end`).

    Args:
        key: in pieces, as are queries.
        query: in pieces.
        whitened: as the forward pass left it.
        tied: as the recursion left it (`reverse.asked_of_kept`), as are `ends`.
        ends: P̄' of every chunk.
        numbers: of every token (`matrices.Numbers`).
        interpret: whether to run the kernel's simulation on a CPU.
    """
    rows, depth, time, width = key.shape
    chunks = time // CHUNK
    slots = 1 if width > WIDTH else 2
    taken = [numbers[:, :, Numbers._fields.index(name)] for name in _NUMBERS[:-1]]
    before = jnp.pad(taken[-1], [(0, 0), (0, 0), (1, 0)])[..., :-1]
    parts = max(1, min(chunks, mosaic.PROCESSORS // rows))
    form = mosaic.operands_of(WIDTH // SHARES)

    def operand(depth, *shape):
        return mosaic.SMEM((slots, depth, *shape), jnp.bfloat16, transforms=form)

    told = mosaic.SMEM((slots, *SQUARE), jnp.float32, transforms=mosaic.ENTRIES)
    scratch = {
        **dict.fromkeys(("keys", "queries"), operand(depth, CHUNK, width)),
        "moved": operand(PIECES, CHUNK, width),
        "ends": operand(PIECES, width, width),
        "pairs": mosaic.SMEM((PIECES, *SQUARE), jnp.bfloat16, transforms=form),
        "vectors": mosaic.SMEM((slots, len(_NUMBERS), CHUNK), jnp.float32),
        **({} if width > WIDTH else {"rows": told, "tied": told}),
        "arrived": mosaic.barrier(num_arrivals=1 + 2 * depth + PIECES + 2 * (width == WIDTH)),
        "met": mosaic.barrier(num_arrivals=SHARES),
    }
    run = mosaic.kernel(
        partial(_asked, chunks=chunks, parts=parts),
        dict.fromkeys(("between", "end"), ((rows, SHARES, time), jnp.float32)),
        {"row": rows, "part": parts},
        scratch,
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    found = run(key, query, whitened, tied, ends, jnp.stack([*taken, before], axis=2))
    return {name: part.sum(axis=1) for name, part in found.items()}


def _asked(*inputs, out, place, chunks, parts, interpret):
    key, query, whitened, tied_in, ends, numbers_in = inputs
    place = SimpleNamespace(**place)
    row, part, share = (lax.axis_index(name) for name in ("row", "part", "wg"))
    width = key.shape[-1]
    wide = width > WIDTH
    here, broad = (Share(share, columns // SHARES, interpret) for columns in (WIDTH, width))
    whole, every = Share(0, CHUNK, interpret), pl.ds(0, width)

    def at(step):
        # The last program may find its last chunk twice.
        return jnp.minimum(part + step * parts, chunks - 1)

    def fetch(step, slot):
        """Each warpgroup starts half of the copies: one alone would stand still for them."""
        chunk = at(step)
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        copies = [(numbers_in.at[row, chunk], place.vectors.at[slot])]
        for source, spot in ((key, place.keys), (query, place.queries)):
            for piece in range(spot.shape[1]):
                copies.append((source.at[row, piece, tokens], spot.at[slot, piece]))
        for piece in range(PIECES):
            copies.append((ends.at[row, chunk, piece], place.ends.at[slot, piece]))
        rows = whitened.at[row, tokens, every], tied_in.at[row, tokens]
        if not wide:
            copies += zip(rows, (place.rows.at[slot], place.tied.at[slot]), strict=True)
        for turn in range(SHARES):

            @pl.when(share == turn)
            def _(turn=turn):
                for source, spot in copies[turn::SHARES]:
                    mosaic.copy_in(source, spot, place.arrived)
                if wide:
                    mosaic.prefetch(rows[turn], interpret)

    fetch(0, 0)

    def through_chunk(step, carry):
        slot = 0 if wide else lax.rem(step, 2)
        tokens = pl.ds(at(step) * CHUNK, CHUNK)

        def leave_sum(ref, matrix):
            ref.at[row, share, tokens][...] = jnp.sum(matrix, axis=1)

        def fetch_next():
            pl.when(step + 1 < steps)(lambda: fetch(step + 1, 0 if wide else 1 - slot))

        mosaic.barrier_wait(place.arrived)
        only = slot + opaque_zero(place.vectors, slot)
        numbers = SimpleNamespace(
            **{name: place.vectors.at[slot, index] for index, name in enumerate(_NUMBERS)}
        )
        if wide:
            rows, tied_rows = whitened.at[row, tokens, every], tied_in.at[row, tokens]
        else:
            rows, tied_rows = place.rows.at[slot], place.tied.at[slot]
        operands = place.keys, place.queries, place.moved, place.ends
        keys, queries, moved, of_end = (Pieces(ref.at[only]) for ref in operands)
        own = broad.load(rows)
        broad.put(moved.ref, own)
        mosaic.meet(place.met, interpret)

        def begin():
            if not wide:
                fetch_next()
            return here.ratios(numbers)

        def find_later():
            later = whole.across(numbers.faded) - whole.along(numbers.faded)
            later = jnp.exp(jnp.minimum(later, 0))
            return pieces(jnp.where(whole.i <= whole.j, later, jnp.zeros_like(later)), PIECES)

        ending, ratios = broad.beside(begin, (moved, of_end))
        written, _ = here.beside(lambda: leave_sum(out["end"], ending * own), (keys, moved.T))
        asked = mosaic.zeros(here.shape)
        for first in range(0, width, WIDTH):
            columns = pl.ds(first, WIDTH)
            tied = pieces(mosaic.load(tied_rows.at[:, columns]), PIECES)
            right = Pieces(moved.ref.at[:, :, columns]).T.right(here.columns)
            asked = asked + here.multiply(pairs(tied, right, PIECES))
        read, later = here.beside(find_later, (queries, moved.T))
        asked = written * asked + here.along(numbers.of_variance) * read * read
        here.put(place.pairs, -(ratios * ratios) * asked)
        mosaic.commit_smem()
        own_pairs = [place.pairs.at[piece, :, here.columns] for piece in range(PIECES)]
        between = here.multiply(pairs(later, own_pairs, PIECES))
        since = here.along(numbers.before) - here.across(numbers.faded)
        between = between * jnp.exp(jnp.minimum(since, 0))
        leave_sum(out["between"], jnp.where(here.i > here.j, between, jnp.zeros_like(between)))
        if wide:
            mosaic.meet(place.met, interpret)
            fetch_next()
        return carry

    steps = -(-chunks // parts)
    lax.fori_loop(0, steps, through_chunk, None)


def of_kept(
    head: Any, found: dict[str, Array], numbers: Numbers, of_added: Float[Array, "chunk token"]
) -> Float[Array, " time"]:
    """λ̄ of one head.

    Args:
        head: what it filters (`kernels.exact.Head`).
        found: what the recursion (`reverse.asked_of_kept`) and `asked` have left.
        numbers: of every token.
        of_added: cotangent of the variance added before each write.
    """

    def by_chunk(array):
        return array.reshape(-1, CHUNK)

    def token_before(array):
        return jnp.pad(array, [(0, 0), (1, 0)])[:, :-1]

    faded, alpha = by_chunk(numbers.faded), by_chunk(numbers.alpha)
    within = jnp.tril(kept_within(faded))
    entered = by_chunk(found["entered"]).at[:, -1].add(found["through"].sum(axis=-1))
    from_start = jnp.sum(within * (alpha**2 * entered)[..., None], axis=-2)
    to_end = -(by_chunk(numbers.end) ** 2) * by_chunk(found["end"])
    to_end = token_before(jnp.sum(within * to_end[:, None], axis=-1))
    crossed = from_start * jnp.exp(token_before(faded)) + within[:, -1] * to_end
    decay = jnp.where(by_chunk(head.starts), 0, jnp.exp(2 * by_chunk(head.log_decay)))
    drifted = of_added * decay * token_before(by_chunk(numbers.drift))
    return (by_chunk(found["between"]) + crossed + drifted).reshape(-1)
