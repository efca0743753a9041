r"""The covariance of design model A in chunks: the gain of every write, exactly.

Covariances do not depend on values, so they are found first. For a chunk that starts from P0, with
α_t the decay and c_t the drift accumulated since its start, and k̃_t = α_t∘k_t,

$$ G_{ts} = \tilde k_t^\top P_0 \tilde k_s + k_t^\top \mathrm{diag}(c_s\,\alpha_t/\alpha_s)\, k_s
   \;(s \le t),\quad G + \mathrm{diag}(r) = L L^\top,\quad X = L^{-1} $$

is the joint covariance of the chunk's values, so L holds the standard deviation of every
innovation on its diagonal. Row t of

$$ U_t = \sum_{s \le t} X_{ts}\, \tfrac{\alpha_t}{\alpha_s} \circ
   (\alpha_s \circ P_0 \tilde k_s + c_s \circ k_s) $$

is the covariance of value t's whitened innovation with the memory after token t. Hence

    gain of token t                  g_t = U_t / L_tt,   innovation variance  L_tt²
    read-out variance at x           x̃ᵀ P0 x̃ + xᵀ diag(c_t) x − Σ_s (x · α_t/α_s∘U_s)²

Every ratio α_t/α_s has s ≤ t and is at most 1 (`layers.chunks`).

**Digits.** Where noise is small, G rounds at the size of P0 and loses r. Its factor is corrected by
that of X G Xᵀ, in which keys are whitened before they meet P0: (XK̃) P0 (XK̃)ᵀ + X diag(r) Xᵀ and
drift's part round at the size of 1 (`layers.triangular`). Where a document starts inside the
chunk, its prior takes the place of P0 for its tokens; values of two documents have covariance 0.

**The chunk's end.** With B = Xᵀ Û, Û_s = α_C/α_s∘U_s, the chunk's values move the mean at its end
by VᵀB, and Ψ = diag(α_C) − K̃ᵀB is its closed loop. Subtracting ÛᵀÛ from what P0 and drift predict
would leave errors the size of P0's rounding, above P_C itself where noise is small. Instead

$$ P_C = \Psi^\top P_0 \Psi + B^\top \mathrm{diag}(r)\, B + \mathrm{diag}(c_C) - E^\top B - B^\top E
   + B^\top G^c B $$

(Joseph's form for a whole chunk; E_s = α_C/α_s∘c_s∘k_s, and G^c is drift's part of G), which is a
minimum over B: an error in B counts by its square. It is what the last document leaves.

**Gradient.** A chunk's closed loop Ψ = diag(α_C) − k̃ᵀ (G + r)⁻¹ Lα U has δP_C = Ψᵀ δP0 Ψ, so
$\bar P_0 = \Psi \bar P_C \Psi^\top$ + what the chunk's own outputs ask of P0. Passing through the
chunks in turn, each is computed again and pulled back at once, which keeps one covariance a chunk
and one chunk's intermediates. In parallel the own parts are found for all chunks at once, and the
recursion in Ψ is combined in a tree.

**Parallel in time.** The tree of chunk maps gives every chunk's start to few digits, as its solves
see noise next to the prior; passing all chunks once from there, in Joseph's form, restores most.

Source: Kalman (1960) in array form; the chunk identities are checked in tests/test_scans.py.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .chunks import (
    Decay,
    accumulated,
    decayed_products,
    decayed_sums,
    from_start,
    last_document,
    since_start,
    to_end,
    whole,
    within_chunk,
    within_documents,
)
from .elements import Element, apply, combine
from .precision import exact_product
from .triangular import cholesky_and_inverse

Algorithm = Literal["chunked", "parallel"]
Square = Float[Array, "key key"]


class Uncertainty(eqx.Module):
    """What decides the covariance: of one chunk, or of all with a leading chunk axis.

    Args:
        key: directions written.
        query: directions read.
        noise: variance of each value.
        log_decay: log of the covariance's decay (of a standard deviation), one or one per key.
        drift: variance added before each write.
        starts: where documents start.
        restart: where documents start, variance before the first write; not read elsewhere.
    """

    key: Float[Array, "*chunks token key"]
    query: Float[Array, "*chunks token key"]
    noise: Float[Array, "*chunks token"]
    log_decay: Float[Array, "*chunks token width"] | None
    drift: Float[Array, "*chunks token other_width"] | None
    starts: Bool[Array, "*chunks token"] | None
    restart: Float[Array, "*chunks token restart_width"] | None


class Gains(eqx.Module):
    """What the covariance decides.

    Args:
        gain: direction in which each innovation moves a row of the memory.
        innovation_variance: variance of each value given those before.
        read_variance: x P x after the write.
    """

    gain: Float[Array, "*chunks token key"]
    innovation_variance: Float[Array, "*chunks token"]
    read_variance: Float[Array, "*chunks token"]


class _Loop(eqx.Module):
    """How a chunk acts on small changes of the covariance that enters it."""

    closed: Float[Array, "*chunks key key"]  # Ψ
    seen: Float[Array, "*chunks token key"]  # X K̃


def through_chunk(covariance: Square, chunk: Uncertainty) -> tuple[Square, Gains, _Loop]:
    """The covariance after one chunk, the chunk's gains, and its closed loop."""
    decay = within_chunk(chunk.log_decay, chunk.starts)
    origin = _Origin(covariance, _restarts(chunk), decay)
    key = since_start(chunk.key, decay)
    carried = origin.times(key)
    joint = within_documents(exact_product(carried, key.T), decay) + jnp.diag(chunk.noise)
    spread = since_start(carried, decay)
    added = drifted = None
    if chunk.drift is not None:
        drift = chunk.drift
        if chunk.starts is not None:  # `restart` has it
            drift = jnp.where(chunk.starts[:, None], 0, drift)
        added = accumulated(drift, decay)
        drifted = _drifted(chunk.key, added, decay)
        joint = joint + drifted.joint
        spread = spread + drifted.spread
    root, inverse = cholesky_and_inverse(
        joint, _congruence(*jax.lax.stop_gradient((origin, key, chunk.noise, drifted)))
    )
    moved = decayed_sums(inverse, spread, decay)
    deviation = jnp.diagonal(root)
    weights = exact_product(inverse.T, to_end(moved, decay))
    after, closed = _at_end(origin, chunk, decay, weights, drifted)
    gains = Gains(
        moved / deviation[:, None],
        deviation**2,
        _read_variance(chunk.query, origin, added, moved),
    )
    return after, gains, _Loop(closed, exact_product(inverse, from_start(chunk.key, decay)))


class _Origin(eqx.Module):
    """What each token's document started from: the chunk's covariance, or its own prior."""

    covariance: Square
    restart: Float[Array, "token width"] | None
    decay: Decay

    def times(self, rows: Float[Array, "token key"]) -> Float[Array, "token key"]:
        """Rows times the covariance that their document started from."""
        carried = exact_product(rows, self.covariance)
        if self.restart is None:
            return carried
        assert self.decay.document is not None
        return jnp.where(self.decay.document[:, None] == 0, carried, self.restart * rows)


def _restarts(chunk: Uncertainty) -> Float[Array, "token width"] | None:
    """Of each token, the variance that its document started from; not read before a start."""
    if chunk.starts is None:
        return None
    assert chunk.restart is not None
    places = jnp.arange(len(chunk.starts))
    return chunk.restart[jax.lax.cummax(jnp.where(chunk.starts, places, 0))]


def _congruence(
    origin: _Origin,
    key: Float[Array, "token key"],
    noise: Float[Array, " token"],
    drifted: "_Drifted | None",
) -> Callable[[Square], Square]:
    """X G Xᵀ of a lower-triangular X: keys are whitened before P0 is between them."""

    def product(inverse: Square) -> Square:
        white = exact_product(inverse, key)
        joint = within_documents(exact_product(origin.times(white), white.T), origin.decay)
        joint = joint + exact_product(inverse * noise, inverse.T)
        if drifted is None:
            return joint
        return joint + exact_product(exact_product(inverse, drifted.joint), inverse.T)

    return product


class _Drifted(eqx.Module):
    """What drift since the chunk's start adds to covariances."""

    joint: Float[Array, "token token"]  # G^c: of values
    spread: Float[Array, "token key"]  # c_s∘k_s: of each value with the memory
    last: Float[Array, " width"]  # c_C: of the memory at the chunk's end


def _drifted(
    key: Float[Array, "token key"], added: Float[Array, "token width"], decay: Decay
) -> _Drifted:
    spread = added * key
    lower = decayed_products(key, spread, decay)
    return _Drifted(lower + jnp.tril(lower, -1).T, spread, added[-1])


def _at_end(
    origin: _Origin, chunk: Uncertainty, decay: Decay, weights, drifted: _Drifted | None
) -> tuple[Square, Square]:
    """P_C, and Ψ, given the weights B of the chunk's values in the mean at its end."""
    covariance, width = origin.covariance, origin.covariance.shape[-1]
    entered = None
    if origin.restart is not None:
        assert decay.document is not None
        entered = decay.document[-1] == 0
        prior = jnp.diag(jnp.broadcast_to(origin.restart[-1], (width,)))
        covariance = jnp.where(entered, covariance, prior)
    last = last_document(decay)
    kept = jnp.diag(jnp.broadcast_to(whole(last, covariance), (width,)))
    closed = kept - exact_product(from_start(chunk.key, last).T, weights)
    after = exact_product(exact_product(closed.T, covariance), closed)
    after = after + exact_product(weights.T, chunk.noise[:, None] * weights)
    if drifted is not None:
        left = to_end(drifted.spread, decay) - exact_product(drifted.joint, weights) / 2
        off = exact_product(left.T, weights)
        after = after + jnp.diag(jnp.broadcast_to(drifted.last, (width,))) - off - off.T
    return _symmetric(after), closed if entered is None else jnp.where(entered, closed, 0)


def _read_variance(query, origin: _Origin, added, moved) -> Float[Array, " token"]:
    seen = since_start(query, origin.decay)
    variance = jnp.sum(origin.times(seen) * seen, axis=-1)
    if added is not None:
        variance = variance + jnp.sum(added * query**2, axis=-1)
    explained = jnp.sum(decayed_products(query, moved, origin.decay) ** 2, axis=-1)
    return jnp.maximum(variance - explained, 0)


def covariance_scan(
    initial: Square, chunks: Uncertainty, algorithm: Algorithm
) -> tuple[Square, Gains]:
    """Covariance after the last chunk, and every token's gain, chunk by chunk.

    Args:
        initial: covariance before the first token.
        chunks: with a leading chunk axis.
        algorithm: "chunked" passes through the chunks in turn; "parallel" combines them in a tree,
            so that depth grows with the logarithm of their number.

    Returns:
        Exact, with a gradient for every argument.
    """
    return _scan(algorithm, initial, chunks)


def _forward(algorithm: Algorithm, initial: Square, chunks: Uncertainty):
    if algorithm == "parallel":
        starts = _starts_in_parallel(initial, chunks)
        ends, _, _ = jax.vmap(through_chunk)(starts, chunks)
        starts = jnp.concatenate([initial[None], ends[:-1]])
        ends, gains, _ = jax.vmap(through_chunk)(starts, chunks)
        return (ends[-1], gains), (starts, chunks)

    def body(covariance, chunk):
        after, gains, _ = through_chunk(covariance, chunk)
        return after, (covariance, gains)

    last, (starts, gains) = jax.lax.scan(body, initial, chunks)
    return (last, gains), (starts, chunks)


def _scan_primal(algorithm: Algorithm, initial: Square, chunks: Uncertainty):
    return _forward(algorithm, initial, chunks)[0]


def _backward(algorithm: Algorithm, residuals, cotangents):
    starts, chunks = residuals
    of_last, of_gains = cotangents
    if algorithm == "parallel":
        return _backward_in_parallel(starts, chunks, of_last, of_gains)

    def body(of_end, moment):
        start, chunk, of_gains = moment
        _, pull = jax.vjp(lambda *inputs: through_chunk(*inputs)[:2], start, chunk)
        return pull((of_end, of_gains))

    return jax.lax.scan(body, of_last, (starts, chunks, of_gains), reverse=True)


def _backward_in_parallel(starts, chunks, of_last, of_gains):
    def chunk_map(starts, chunks):
        after, gains, loop = jax.vmap(through_chunk)(starts, chunks)
        return (after, gains), loop.closed

    _, pull, closed = jax.vjp(chunk_map, starts, chunks, has_aux=True)
    own, _ = pull((jnp.zeros_like(starts), of_gains))
    of_ends, of_initial = _ends_in_parallel(of_last, closed, own)
    _, of_chunks = pull((of_ends, of_gains))
    return of_initial, of_chunks


_scan = jax.custom_vjp(_scan_primal, nondiff_argnums=(0,))
_scan.defvjp(_forward, _backward)


# -- parallel in time ---------------------------------------------------------------------------


def _element(chunk: Uncertainty) -> Element:
    """A chunk's map of covariances; no rows of means."""
    width = chunk.key.shape[-1]
    zero, none = jnp.zeros((width, width), chunk.key.dtype), jnp.zeros((0, width), chunk.key.dtype)
    after, _, loop = through_chunk(zero, chunk)
    return Element(loop.closed.T, none, after, none, exact_product(loop.seen.T, loop.seen))


def _symmetric(square: Float[Array, "*chunks key key"]) -> Float[Array, "*chunks key key"]:
    return (square + square.mT) / 2


def _starts_in_parallel(initial: Square, chunks: Uncertainty) -> Float[Array, "chunk key key"]:
    elements = jax.vmap(_element)(chunks)
    prefixes = jax.lax.associative_scan(combine, elements)
    none = jnp.zeros((0, len(initial)), initial.dtype)
    _, ends = jax.vmap(apply, (0, None, None))(prefixes, none, initial)
    return jnp.concatenate([initial[None], ends[:-1]])


def _ends_in_parallel(of_last: Square, closed: Array, own: Array) -> tuple[Array, Square]:
    """Cotangents of every chunk's end and of the initial covariance."""

    def follow(later, earlier):
        closed = exact_product(earlier[0], later[0])
        own = exact_product(exact_product(earlier[0], later[1]), earlier[0].mT) + earlier[1]
        return closed, own

    suffixes = jax.lax.associative_scan(follow, (closed, own), reverse=True)
    of_starts = exact_product(exact_product(suffixes[0], of_last), suffixes[0].mT) + suffixes[1]
    return jnp.concatenate([of_starts[1:], of_last[None]]), of_starts[0]
