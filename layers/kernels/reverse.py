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
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from . import mosaic
from .forward import CHUNK, SAVED_PIECES, WIDTH
from .mosaic import BLOCK, COLUMNS, ROWS, along_columns, along_rows, pieces

PIECES = SAVED_PIECES
PROCESSORS = 132
"""Multiprocessors of a Hopper GPU."""
SHARES = 2
"""Warpgroups that share the columns of a chunk's matrices."""
SQUARE = (CHUNK, WIDTH)


class Numbers(NamedTuple):
    """Numbers a token that the kernels take together, (row, time)."""

    total: Array  # log decay since the chunk's start
    document: Array  # how many documents have started since
    alpha: Array
    drift: Array
    end: Array
    of_variance: Array
    of_evidence: Array
    inverse_deviation: Array
    faded: Array | None = None  # log λ of a restoration, summed since the chunk's start

    def by_chunk(self) -> Float[Array, "row chunk number token"]:
        stacked = jnp.stack([part for part in self if part is not None], axis=1)
        cut = stacked.reshape(*stacked.shape[:2], -1, CHUNK)
        return jnp.swapaxes(cut, 1, 2)


def numbers_of(ref) -> Numbers:
    """References to each of a chunk's numbers."""
    return Numbers(*(ref.at[index] for index in range(ref.shape[0])))


def restores(numbers: Float[Array, "row chunk number token"]) -> bool:
    """Whether covariances are restored, from how many numbers a token has."""
    return numbers.shape[2] == len(Numbers._fields)


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
    rows, depth, time, width = key.shape
    chunks = time // CHUNK
    wide = width > WIDTH
    broad = CHUNK, width

    def pieced(shape):
        return jax.ShapeDtypeStruct((rows, chunks, PIECES, *shape), jnp.bfloat16)

    out = [pieced(broad), pieced(SQUARE), pieced(SQUARE)]
    out += [jax.ShapeDtypeStruct((rows, chunks, *SQUARE), jnp.float32)] * 2
    parts = max(1, min(chunks, PROCESSORS // rows))
    form = mosaic.operands_of(WIDTH // SHARES)
    operand = mosaic.SMEM((1, PIECES, *SQUARE), jnp.bfloat16, transforms=form)
    moved = mosaic.SMEM((1, PIECES, *broad), jnp.bfloat16, transforms=form)
    given = mosaic.SMEM((1, depth, *broad), jnp.bfloat16, transforms=form)
    told = [
        mosaic.SMEM((CHUNK, columns), jnp.float32, transforms=mosaic.ENTRIES)
        for columns in ([] if wide else [width + WIDTH, WIDTH])
    ]
    run = mosaic.kernel(
        partial(_local, chunks=chunks, parts=parts, values=values, interpret=interpret),
        out,
        {"row": rows, "part": parts},
        [
            given,
            given,
            mosaic.SMEM((2, *numbers.shape[2:]), jnp.float32),
            mosaic.SMEM((CHUNK, WIDTH + 4), jnp.float32),
            mosaic.barrier(num_arrivals=1 + 2 * depth + len(told)),
            mosaic.barrier(num_arrivals=SHARES),
            moved,
            *[operand] * (5 + restores(numbers)),
            *told,
        ],
        SHARES,
        interpret,
        reduction_bytes=16,
    )
    return run(key, query, whitened, of_mean, numbers)


class Share:
    """A warpgroup's share of the columns of a chunk's matrices: indices, vectors, ratios."""

    def __init__(self, which, width, interpret, rows=CHUNK):
        self.shape = (rows, width)
        self.first = which * width
        self.columns = pl.ds(self.first, width)
        self.i = mosaic.index(self.shape, 0)
        self.j = mosaic.index(self.shape, 1) + self.first
        self.interpret = interpret
        self.multiply = partial(mosaic.product, self.shape, interpret=interpret)

    def along(self, ref):
        """A number a token, all along its row."""
        return along_rows(mosaic.load(ref, ROWS), self.shape)

    def across(self, ref):
        """A number a token, all along its column."""
        return along_columns(mosaic.load(ref.at[self.columns], COLUMNS), self.shape)

    def ratios(self, numbers):
        same = self.along(numbers.document) == self.across(numbers.document)
        allowed = jnp.logical_and(self.i >= self.j, same)
        # The exponent is at most 0 where it counts.
        exponent = self.along(numbers.total) - self.across(numbers.total)
        ratio = jnp.exp(jnp.minimum(exponent, 0))
        return jnp.where(allowed, ratio, jnp.zeros_like(ratio))

    def lower(self, square):
        return jnp.where(self.i >= self.j, square, jnp.zeros_like(square))

    def diagonal(self, square):
        return jnp.where(self.i == self.j, square, jnp.zeros_like(square))

    def halved(self, square):
        return self.lower(jnp.where(self.i == self.j, square * 0.5, square))

    def halved_above(self, square):
        halved = jnp.where(self.i == self.j, square * 0.5, square)
        return jnp.where(self.i <= self.j, halved, jnp.zeros_like(square))

    def lasting(self, numbers):
        """What restoration keeps of the covariance between two tokens, the later in a row."""
        between = self.along(numbers.faded) - self.across(numbers.faded)
        return jnp.exp(jnp.minimum(between, 0))

    def since(self, numbers):
        """Decay of the covariance since the chunk's start."""
        fade = self.along(numbers.alpha)
        fade = fade * fade
        return fade if numbers.faded is None else fade * jnp.exp(self.along(numbers.faded))

    def until(self, numbers):
        """What restoration keeps of the covariance from each token to the chunk's end."""
        return jnp.exp(numbers.faded[CHUNK - 1] - self.along(numbers.faded))

    def load(self, ref):
        return mosaic.load(ref.at[:, self.columns]).astype(jnp.float32)

    def put(self, ref, matrix):
        for piece, part in enumerate(pieces(matrix, PIECES)):
            ref.at[piece, :, self.columns][...] = part

    def plain(self, ref):
        """Own share of what pieces sum to."""
        return sum(self.load(ref.at[piece]) for piece in range(ref.shape[0]))

    def times(self, *factors):
        """Own share of a sum of products, each of (left, right) whose pieces are whole."""
        return self.multiply(self._terms(factors))

    def beside(self, work, *factors):
        """`times`, and what is done meanwhile."""
        return mosaic.product_beside(self.shape, self._terms(factors), work, self.interpret)

    def within(self, between, left, right):
        """Own share of a product, of some of the indices that it sums over."""
        every = range(PIECES)
        lefts = [left.ref.at[piece, :, between] for piece in every]
        rights = [right.ref.at[piece, between, self.columns] for piece in every]
        return self.multiply(mosaic.pairs(lefts, rights, PIECES))

    def _terms(self, factors):
        terms = []
        for left, right in factors:
            terms += mosaic.pairs(left.left(), right.right(self.columns), PIECES)
        return terms


class Pieces:
    """A matrix in shared memory, or its transpose."""

    def __init__(self, ref, transposed=False):
        self.ref, self.transposed = ref, transposed

    @property
    def T(self):
        return Pieces(self.ref, not self.transposed)

    def left(self):
        parts = [self.ref.at[piece] for piece in range(self.ref.shape[0])]
        return [part.transpose((1, 0)) for part in parts] if self.transposed else parts

    def right(self, columns):
        if self.transposed:
            every = range(self.ref.shape[0])
            return [self.ref.at[piece, columns].transpose((1, 0)) for piece in every]
        return [self.ref.at[piece, :, columns] for piece in range(self.ref.shape[0])]


def _local(
    key,
    query,
    whitened,
    of_mean,
    numbers_in,
    weights_out,
    explained_out,
    of_read_out,
    of_value_out,
    of_joint_out,
    *scratch,
    chunks,
    parts,
    values,
    interpret,
):
    row, part = lax.axis_index("row"), lax.axis_index("part")
    share = lax.axis_index("wg")
    here = Share(share, WIDTH // SHARES, interpret)
    keys_in, queries_in, vectors, blocks, arrived, met, moved, *operands = scratch
    width = keys_in.shape[-1]
    wide = width > WIDTH
    # Rows of the next chunk are copied to shared memory where it has room for them.
    told = [] if wide else [operands.pop(-2), operands.pop()]
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
        for source, target in ((key, keys_in), (query, queries_in)):
            for piece in range(target.shape[1]):
                tokens = source.at[row, piece, pl.ds(chunk * CHUNK, CHUNK)]
                mosaic.copy_in(tokens, target.at[0, piece], arrived)

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
        place = [ref.at[only] for ref in (keys_in, queries_in, moved, *operands)]
        keys, queries, moved_by, *places = map(Pieces, place)
        # Each place holds in turn: a, R̄ and ρ∘H̄; b, W, what joins blocks of 16, L⁻¹; c, W̄ and B;
        # d, R, inverses of blocks of 32, L⁻ᵀ times what is within, Θ; e, U, inverses of blocks of
        # 16, what joins those of 32, εU; f, Ȳ, L, what is within Ḡ, W.
        a, b, c, d, f, *others = places
        e = Pieces(place[2].at[:, :, :WIDTH]) if wide else moved_by
        # L⁻¹ with λ besides, where covariances are restored.
        lasting = others.pop() if others else b
        weights = moved_by if wide else c
        if wide:
            wait_for_outputs()
            meet()
        broad.put(moved_by.ref, broad.load(rows))
        here.put(b.ref, surprises())
        here.put(f.ref, here.load(asked))
        if not wide:
            wait_for_outputs()
        meet()
        factor, ratios = here.beside(lambda: here.ratios(numbers), (keys, moved_by.T))
        factor = factor * ratios

        def invert_blocks():
            blocks.at[:, here.columns][...] = factor
            mosaic.invert_blocks(blocks, numbers.inverse_deviation, here.first, interpret)

        read, _ = here.beside(invert_blocks, (queries, moved_by.T))
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
            broad.put(moved_by.ref, broad.along(numbers.end) * broad.load(rows))
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
            return here.ratios(numbers)

        # Ḡ is minus half the product, and its lower triangle off the diagonal counts twice.
        of_joint, ratios = here.beside(put_surprise, (d, lasting))
        if numbers.faded is not None:
            crossed = here.times((lasting.T, d.T))
            of_joint = of_joint + here.lasting(numbers) * crossed

        def leave_joint():
            leave(of_joint_out, -here.halved(of_joint) * ratios)

        of_read, _ = here.beside(leave_joint, (a, lasting))
        of_read = of_read * ratios
        of_value = here.times((b.T, c))
        weight, _ = broad.beside(lambda: leave(of_value_out, of_value), (b.T, moved_by))
        meet()

        def put_outputs():
            here.put(a.ref, of_read)
            broad.put(weights.ref, weight)

        explained, _ = here.beside(put_outputs, (lasting.T, f))
        here.put(d.ref, explained)
        meet()

        for place, ref in ((weights, weights_out), (d, explained_out), (a, of_read_out)):
            mosaic.copy_out(place.ref.at[share], ref.at[row, chunk, share])
        return carry

    steps = -(-chunks // parts)
    lax.fori_loop(0, steps, through_chunk, None)
    mosaic.wait_out(0)


def opaque_zero(vectors, slot):
    """0, which the compiler cannot know.

    Buffers are indexed by it: otherwise the compiler computes every operand's descriptor once,
    before the loop over chunks, and keeps hundreds of them in local memory.
    """
    return jnp.where(vectors[slot, Numbers._fields.index("alpha"), CHUNK - 1] < 0, 1, 0)


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
    body = partial(_recur, names=tuple(out), places=tuple(scratch), chunks=chunks)
    run = mosaic.kernel(
        partial(body, interpret=interpret),
        [jax.ShapeDtypeStruct(*kind) for kind in out.values()],
        {"row": rows},
        list(scratch.values()),
        SHARES,
        interpret,
    )
    got = run(
        key,
        query,
        of_mean,
        numbers,
        *found,
        means,
        covariances,
        of_last_mean,
        of_last_covariance,
    )
    return joined(dict(zip(out, got, strict=True)))


def asked_of_kept(rows: int, time: int, width: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What is left of a restored covariance for λ's cotangent.

    `tied` is Ē; `ends`, P̄' of every chunk; `entered`, ē·P k + v̄ x·P x with the chunk's own P.
    """
    f32 = jnp.float32
    return {
        "tied": ((rows, time, width), f32),
        "ends": ((rows, time // CHUNK, width, width), f32),
        "entered": ((rows, SHARES, time), f32),
    }


def joined(found: dict[str, Array]) -> dict[str, Array]:
    """Sums of which each warpgroup has left its own share."""
    shared = {"noise", "drift", "moved", "trace", "scale", "entered"} & found.keys()
    return found | {name: found[name].sum(axis=1) for name in shared}


TURNING = {"weights": "of_means", "spreads": "of_covariances"}
"""B and Θ of the next chunk are copied to where M̄ and P̄ of this one have been read."""


class Memory:
    """Shared memory of a recursion through chunks, by name, and the copies to it.

    A few matrices are copied at a time: the copy engine takes some four, and who starts more stands
    still meanwhile.
    """

    @staticmethod
    def scratch(depth, numbers, held, arrivals) -> dict[str, Any]:
        """For keys and queries of `depth` pieces, further operands and groups of copies."""
        form = mosaic.operands_of(WIDTH // SHARES)

        def operand(depth, turns=1):
            return mosaic.SMEM((turns, depth, *SQUARE), jnp.bfloat16, transforms=form)

        return {
            **dict.fromkeys(("keys", "queries"), operand(depth)),
            **dict.fromkeys(held, operand(PIECES)),
            **dict.fromkeys(TURNING, operand(PIECES, turns=2)),
            "vectors": mosaic.SMEM((2, *numbers.shape[2:]), jnp.float32),
            "numbered": mosaic.barrier(num_arrivals=1, num_barriers=2),
            "handed": mosaic.barrier(num_arrivals=len(TURNING) * PIECES),
            **{name: mosaic.barrier(num_arrivals=number) for name, number in arrivals.items()},
            "met": mosaic.barrier(num_arrivals=SHARES),
        }

    def __init__(self, names, refs, interpret):
        self.refs = dict(zip(names, refs, strict=True))
        self.held = names[: names.index(next(iter(TURNING)))]
        self.vectors = self.refs["vectors"]
        self.interpret = interpret

    def find(self, slot):
        """Operands, whose addresses the compiler finds anew: kept, they would be spilled."""
        only = mosaic.uniform(opaque_zero(self.vectors, slot), self.interpret)
        found = {name: Pieces(self.refs[name].at[only]) for name in self.held}
        for name, other in TURNING.items():
            found[name] = Pieces(self.refs[name].at[slot + only])
            found[other] = Pieces(self.refs[name].at[1 - slot - only])
        return SimpleNamespace(**found)

    def next_phase(self, slot):
        """Operands, once all warpgroups have met."""
        found = self.find(slot)
        self.meet()
        return found

    def meet(self):
        mosaic.meet(self.refs["met"], self.interpret)

    def bring(self, when, group, *copies):
        """Start a group's copies of matrices' pieces, (from, to)."""

        @pl.when(when)
        def _():
            for source, spot in copies:
                for piece in range(spot.shape[0]):
                    mosaic.copy_in(source.at[piece], spot.at[piece], self.refs[group])

    def hand(self, when, slot, *sources):
        """Start copies of B and Θ."""
        spots = (self.refs[name].at[slot] for name in TURNING)
        self.bring(when, "handed", *zip(sources, spots, strict=True))

    def number(self, when, slot, source):
        @pl.when(when)
        def _():
            mosaic.copy_in(source, self.vectors.at[slot], self.refs["numbered"].at[slot])

    def wait(self, group):
        mosaic.barrier_wait(self.refs[group])

    def wait_numbers(self, slot):
        mosaic.barrier_wait(self.refs["numbered"].at[slot])
        return numbers_of(self.vectors.at[slot])


def _recur(*refs, names, places, chunks, interpret):
    key, query, of_mean, numbers_in, weights_in, spreads_in, reads_in = refs[:7]
    of_value_in, of_joint_in, means_in, covariances_in = refs[7:11]
    of_last_mean, of_last_covariance = refs[11:13]
    out = dict(zip(names, refs[13 : 13 + len(names)], strict=True))
    memory = Memory(places, refs[13 + len(names) :], interpret)
    row, share = lax.axis_index("row"), lax.axis_index("wg")
    own = Share(share, WIDTH // SHARES, interpret)

    memory.number(share == 0, 0, numbers_in.at[row, chunks - 1])
    memory.hand(share == 0, 0, weights_in.at[row, chunks - 1], spreads_in.at[row, chunks - 1])

    def chunk(step, carry):
        of_mean_end, of_covariance_end = carry
        c = chunks - 1 - step
        before = jnp.maximum(c - 1, 0)
        tokens, slot = pl.ds(c * CHUNK, CHUNK), lax.rem(step, 2)
        copies, copies_next = share == 0, jnp.logical_and(share == 0, c > 0)

        def leave(name, matrix):
            ref = out[name]
            ref.at[row, tokens, here.columns][...] = matrix.astype(ref.dtype)

        def leave_sum(name, matrix):
            at = c if len(out[name].shape) == 4 else tokens
            out[name].at[row, share, at][...] = jnp.sum(matrix, axis=1)

        numbers = memory.wait_numbers(slot)
        # Indices anew too: what is known of diagonals would be kept from before the loop.
        here = Share(share + opaque_zero(memory.vectors, slot), WIDTH // SHARES, interpret)
        held = memory.find(slot)
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
            out["ends"].at[row, c, :, here.columns][...] = of_covariance_end
            through = through * jnp.exp(numbers.faded[CHUNK - 1])
        here.put(held.of_means.ref, of_mean_end)
        here.put(held.of_covariances.ref, of_covariance_end)
        memory.wait("handed")
        held = memory.next_phase(slot)
        of_value = here.load(of_value_in.at[row, c])
        cotangent = here.load(of_mean.at[row, tokens])

        def find_spread():
            memory.bring(
                copies,
                "queries_there",
                (query.at[row, :, tokens], held.queries.ref),
                (reads_in.at[row, c], held.reads.ref),
            )
            return here.times((held.weights, held.of_covariances))

        guided, spread = here.beside(find_spread, (held.spreads, held.of_means))
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
            between, _ = here.beside(bring_mean, (held.squares, held.weights.T))
            between = here.lasting(numbers) * between
            between = between + here.times((held.weights, held.squares.T))
        memory.wait("keys_there")

        def leave_joint():
            joint = of_joint - here.halved(between) * here.ratios(numbers)
            leave_sum("noise", here.diagonal(joint))
            here.put(held.joints.ref, joint)
            return here.plain(held.keys.ref)

        carried, plain_key = here.beside(leave_joint, (held.keys, held.covariance))
        tied = since * carried + added * plain_key
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

        def find_asked():
            @pl.when(copies)
            def _():
                for ref in (of_value_in, of_joint_in):
                    mosaic.prefetch(ref.at[row, before], interpret)
                mosaic.prefetch(of_mean.at[row, pl.ds(before * CHUNK, CHUNK)], interpret)

            return here.times(
                (held.keys.T, held.spreads),
                (held.spreads.T, held.keys),
                (held.queries.T, held.squares),
            )

        of_mean_start, doubled = here.beside(
            find_asked, (held.of_values.T, held.keys), (held.given.T, held.queries)
        )
        of_mean_start = kept * of_mean_end + of_mean_start
        memory.wait("mean_there")

        def find_start():
            of_covariance_start = through * of_covariance_end + 0.5 * doubled
            scale = here.plain(held.mean.ref) * of_mean_start
            leave_sum("scale", scale + 2 * here.plain(held.covariance.ref) * of_covariance_start)
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
