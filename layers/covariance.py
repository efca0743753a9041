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
    covariance at the chunk's end    diag(α_C) P0 diag(α_C) + diag(c_C) − Σ_s (α_C/α_s∘U_s)(…)ᵀ

Every ratio α_t/α_s has s ≤ t and is at most 1 (`layers.chunks`).

**Gradient.** The chunk's closed loop Ψ = diag(α_C) − k̃ᵀ (G + r)⁻¹ Lα U has δP_C = Ψᵀ δP0 Ψ, so the
backward pass over chunks is a recursion of K×K products alone, $\bar P_0 = \Psi \bar P_C \Psi^\top$
+ what this chunk's own outputs ask of P0. The rest is done for all chunks at once. Only the
covariances at chunk starts are kept.

Source: Kalman (1960) in array form; the chunk identities are checked in tests/test_scans.py.
"""

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
    to_end,
    whole,
    within_chunk,
)
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
        drift: variance added before each write; at a document's start the whole prior variance.
        starts: where documents start.
    """

    key: Float[Array, "*chunks token key"]
    query: Float[Array, "*chunks token key"]
    noise: Float[Array, "*chunks token"]
    log_decay: Float[Array, "*chunks token width"] | None
    drift: Float[Array, "*chunks token other_width"] | None
    starts: Bool[Array, "*chunks token"] | None


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

    kept: Float[Array, "*chunks width"]  # α_C
    seen: Float[Array, "*chunks token key"]  # X K̃
    end: Float[Array, "*chunks token key"]  # α_C/α_s∘U_s

    @property
    def closed(self) -> Float[Array, "*chunks key key"]:
        """The closed loop Ψ."""
        width = self.end.shape[-1]
        kept = jnp.broadcast_to(self.kept, (*self.kept.shape[:-1], width))
        return kept[..., None] * jnp.eye(width) - exact_product(self.seen.mT, self.end)


def through_chunk(covariance: Square, chunk: Uncertainty) -> tuple[Square, Gains, _Loop]:
    """The covariance after one chunk, the chunk's gains, and its closed loop."""
    decay = within_chunk(chunk.log_decay, chunk.starts)
    key = from_start(chunk.key, decay)
    carried = exact_product(key, covariance)
    joint = exact_product(carried, key.T) + jnp.diag(chunk.noise)
    spread = from_start(carried, decay)
    added = None if chunk.drift is None else accumulated(chunk.drift, decay)
    if added is not None:
        drifted = added * chunk.key
        lower = decayed_products(chunk.key, drifted, decay)
        joint = joint + lower + jnp.tril(lower, -1).T
        spread = spread + drifted
    root, inverse = cholesky_and_inverse(joint)
    moved = decayed_sums(inverse, spread, decay)
    deviation = jnp.diagonal(root)
    end = to_end(moved, decay)
    kept = whole(decay, covariance)
    after = kept[:, None] * covariance * kept - exact_product(end.T, end)
    if added is not None:
        after = after + jnp.diag(jnp.broadcast_to(added[-1], key.shape[1:]))
    gains = Gains(
        moved / deviation[:, None],
        deviation**2,
        _read_variance(chunk.query, covariance, added, moved, decay),
    )
    return after, gains, _Loop(kept, exact_product(inverse, key), end)


def _read_variance(query, covariance, added, moved, decay: Decay) -> Float[Array, " token"]:
    seen = from_start(query, decay)
    variance = jnp.sum(exact_product(seen, covariance) * seen, axis=-1)
    if added is not None:
        variance = variance + jnp.sum(added * query**2, axis=-1)
    explained = jnp.sum(decayed_products(query, moved, decay) ** 2, axis=-1)
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
        starts, last = _starts_in_parallel(initial, chunks)
        _, gains, _ = jax.vmap(through_chunk)(starts, chunks)
        return (last, gains), (starts, chunks)

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

    def chunk_map(starts, chunks):
        after, gains, loop = jax.vmap(through_chunk)(starts, chunks)
        return (after, gains), loop.closed

    _, pull, closed = jax.vjp(chunk_map, starts, chunks, has_aux=True)
    own, _ = pull((jnp.zeros_like(starts), of_gains))
    if algorithm == "parallel":
        of_ends, of_initial = _ends_in_parallel(of_last, closed, own)
    else:

        def body(of_end, chunk):
            closed, own = chunk
            of_start = exact_product(exact_product(closed, of_end), closed.T) + own
            return of_start, of_end

        of_initial, of_ends = jax.lax.scan(body, of_last, (closed, own), reverse=True)
    _, of_chunks = pull((of_ends, of_gains))
    return of_initial, of_chunks


_scan = jax.custom_vjp(_scan_primal, nondiff_argnums=(0,))
_scan.defvjp(_forward, _backward)


# -- parallel in time ---------------------------------------------------------------------------


class _Element(eqx.Module):
    r"""A chunk's map of covariances, $P \mapsto A^\top (I + P J)^{-1} P A + C$.

    Source: Särkkä & García-Fernández (2021), IEEE TAC 66(1), without the means.
    """

    closed: Float[Array, "*chunks key key"]  # A: the closed loop from P = 0
    added: Float[Array, "*chunks key key"]  # C: the covariance after the chunk from P = 0
    information: Float[Array, "*chunks key key"]  # J: what the chunk says about its start


def _element(chunk: Uncertainty) -> _Element:
    zero = jnp.zeros((chunk.key.shape[-1],) * 2, chunk.key.dtype)
    after, _, loop = through_chunk(zero, chunk)
    return _Element(loop.closed, after, exact_product(loop.seen.T, loop.seen))


def _combine(first: _Element, second: _Element) -> _Element:
    """The map of two chunks in turn."""
    identity = jnp.eye(first.added.shape[-1], dtype=first.added.dtype)
    system = identity + exact_product(first.added, second.information)
    right = jnp.concatenate([first.added, first.closed.mT], axis=-1)
    solved = jnp.linalg.solve(system, right)
    width = identity.shape[-1]
    added, closed = solved[..., :width], solved[..., width:].mT
    return _Element(
        exact_product(closed, second.closed),
        _symmetric(exact_product(exact_product(second.closed.mT, added), second.closed))
        + second.added,
        _symmetric(exact_product(exact_product(closed, second.information), first.closed.mT))
        + first.information,
    )


def _symmetric(square: Float[Array, "*chunks key key"]) -> Float[Array, "*chunks key key"]:
    return (square + square.mT) / 2


def _starts_in_parallel(initial: Square, chunks: Uncertainty) -> tuple[Array, Square]:
    elements = jax.vmap(_element)(chunks)
    prefixes = jax.lax.associative_scan(jax.vmap(_combine), elements)

    def apply(element: _Element) -> Square:
        identity = jnp.eye(len(initial), dtype=initial.dtype)
        system = identity + exact_product(initial, element.information)
        inner = exact_product(jnp.linalg.solve(system, initial), element.closed)
        return _symmetric(exact_product(element.closed.T, inner)) + element.added

    ends = jax.vmap(apply)(prefixes)
    return jnp.concatenate([initial[None], ends[:-1]]), ends[-1]


def _ends_in_parallel(of_last: Square, closed: Array, own: Array) -> tuple[Array, Square]:
    """Cotangents of every chunk's end and of the initial covariance."""

    def combine(later, earlier):
        closed = exact_product(earlier[0], later[0])
        own = exact_product(exact_product(earlier[0], later[1]), earlier[0].mT) + earlier[1]
        return closed, own

    suffixes = jax.lax.associative_scan(combine, (closed, own), reverse=True)
    of_starts = exact_product(exact_product(suffixes[0], of_last), suffixes[0].mT) + suffixes[1]
    return jnp.concatenate([of_starts[1:], of_last[None]]), of_starts[0]
