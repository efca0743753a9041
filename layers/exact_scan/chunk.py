r"""A chunk of tokens as one map of the belief: matrix products and one small factorisation.

Let Φ be the decay products (`layers.spans`), ρ_t and Λ[t,s] the same products of the restoration
dial λ (1 where there is none), P0 and M0 the belief at the chunk's start, α_t = Φ(t, start), and
c_t the covariance that drift builds up from the chunk's start. Without the chunk's own writes the
covariance at t is $O_t = ρ_t α_t P_0 α_t + c_t$. With it

    B[t,s] = k_t Φ(t,s) O_s k_s + [t = s] r_t        X[t,s] = x_t Φ(t,s) O_s k_s          (s <= t)
    B = L (L∘Λ)ᵀ,  lower triangle                   A (L∘Λ)ᵀ = X, lower triangle
    L W = V − (k∘α) M0ᵀ                             (L∘Λ) U = [Φ(end,s) O_s k_s]_s
    mean_t = (x∘α) M0ᵀ + A W                        var_t = x_t O_t x_t − Σ_s Λ[t,s] A[t,s]²
    M = M0 α + Wᵀ U                                 P = O_end − Uᵀ diag(Λ[end]) U

With λ = 1, L is the Cholesky factor of the values' joint covariance. Below 1 the mean decays more
slowly than the gains that the covariance's decay implies; L[t,s] / L[s,s] is then the effect of
innovation s on the mean at k_t. Only whole powers of λ appear, so λ = 0, the delta rule, is
an ordinary point, gradients included.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from ..spans import Span, span
from .tokens import Scalar, State, Steps

Square = Float[Array, "time time"]


class Reads(eqx.Module):
    """What a chunk returns to its tokens."""

    mean: Float[Array, "time value"]
    variance: Float[Array, " time"]
    log_evidence: Float[Array, " time"]


class Prepared(eqx.Module):
    """What of a chunk does not depend on the belief at its start.

    Args:
        rows: keys, then queries, times α.
        value: the values.
        open_loop: what drift adds to B, above what it adds to X; noise on B's diagonal.
        drifted: Φ(end,s) c_s k_s, what drift adds to the right-hand side of U.
        drift_read: what drift adds to the variance read.
        drift_end: c at the chunk's end.
        decays: Φ.
        powers: ρ.
        between: Λ.
    """

    rows: Float[Array, "stack time key"]
    value: Float[Array, "time value"]
    open_loop: Float[Array, "stack time time"]
    drifted: Float[Array, "time key"] | None
    drift_read: Float[Array, " time"] | None
    drift_end: Float[Array, " wide"] | None
    decays: Span
    powers: Float[Array, " time"] | None
    between: Square | None


class Closed(eqx.Module):
    r"""A chunk between its ends, for one belief (M0, P0) at its start.

    $$ δM = δM_0 Ψ + Θ\, δP_0 Ψ,\qquad δP = ρ Ψ^\top δP_0 Ψ $$

    Args:
        transition: Ψ = diag(α) − (L⁻¹(k∘α))ᵀ U at the chunk's end.
        write: M − M0 Ψ.
        pull: Θ = Wᵀ diag(ρ) L⁻¹(k∘α).
        information: (L⁻¹(k∘α))ᵀ diag(ρ) L⁻¹(k∘α).
        power: ρ at the chunk's end; 0 where a document starts inside the chunk.
    """

    transition: Float[Array, "key key"]
    write: Float[Array, "value key"]
    pull: Float[Array, "value key"]
    information: Float[Array, "key key"]
    power: Scalar


class Solved(eqx.Module):
    """A chunk's factor and the solutions against it."""

    factor: Square
    whitened: Float[Array, "time value"]
    reads: Square
    writes: Float[Array, "time key"]
    row_means: Float[Array, "stack time value"]
    row_covariances: Float[Array, "stack time key"]


def prepare(steps: Steps) -> Prepared:
    """Do the part of a chunk's work that needs no belief."""
    decays = span(steps.decay, steps.reset)
    rows = jnp.stack([steps.key, steps.query])
    powers = between = None
    if steps.kept is not None:
        dial = span(steps.kept[:, None], steps.reset)
        powers, between = dial.since_start[:, 0], dial.between
    open_loop = jnp.zeros((2, *2 * steps.noise.shape), steps.noise.dtype)
    drifted = drift_read = drift_end = None
    if steps.drift is not None:
        built = _built_up(steps)
        open_loop = decays.scores(rows, built * steps.key)
        drifted = decays.until_end * built * steps.key
        drift_read = jnp.sum(built * steps.query**2, axis=1)
        drift_end = built[-1]
    open_loop = open_loop.at[0].add(jnp.diag(steps.noise))
    return Prepared(
        rows=rows * decays.since_start,
        value=steps.value,
        open_loop=open_loop,
        drifted=drifted,
        drift_read=drift_read,
        drift_end=drift_end,
        decays=decays,
        powers=powers,
        between=between,
    )


def advance(prepared: Prepared, start: State, fresh: State | None) -> tuple[State, Reads]:
    """Take a chunk from the belief at its start to the one at its end; `fresh` begins documents."""
    solved = _solve(prepared, start, fresh)
    mean = solved.row_means[1] + solved.reads @ solved.whitened
    effects = solved.reads**2
    variance = jnp.sum(solved.row_covariances[1] * prepared.rows[1], axis=1)
    if prepared.powers is not None:
        variance = prepared.powers * variance
        effects = prepared.between * effects
    variance = variance - jnp.sum(effects, axis=1)
    if prepared.drift_read is not None:
        variance = variance + prepared.drift_read
    log_evidence = -0.5 * (
        prepared.value.shape[1] * jnp.log(2 * jnp.pi * jnp.diag(solved.factor) ** 2)
        + jnp.sum(solved.whitened**2, axis=1)
    )
    return _end(prepared, solved, start, fresh), Reads(mean, variance, log_evidence)


def closed_loop(prepared: Prepared, start: State, fresh: State | None) -> Closed:
    """Return the chunk's closed loop at this belief; a document's start inside cuts it."""
    solved = _solve(prepared, start, fresh)
    rows, end, power = prepared.rows[0], prepared.decays.since_start[-1], jnp.ones_like
    powers = power(prepared.rows[0, :, 0]) if prepared.powers is None else prepared.powers
    whole = jnp.ones((), rows.dtype)
    if prepared.decays.carried is not None:
        rows = jnp.where(prepared.decays.carried[:, None], rows, 0)
        whole = prepared.decays.carried[-1].astype(rows.dtype)
    seen = solve_triangular(solved.factor, rows, lower=True)
    transition = -seen.T @ solved.writes
    transition = transition + whole * jnp.diag(jnp.broadcast_to(end, rows.shape[1:]))
    last = _end(prepared, solved, start, fresh)
    return Closed(
        transition=transition,
        write=last.mean - start.mean @ transition,
        pull=(powers[:, None] * solved.whitened).T @ seen,
        information=(powers[:, None] * seen).T @ seen,
        power=whole * powers[-1],
    )


def _solve(prepared: Prepared, start: State, fresh: State | None) -> Solved:
    rows, decays = prepared.rows, prepared.decays
    row_means, row_covariances = rows @ start.mean.T, rows @ start.covariance
    if fresh is not None:
        carried = decays.carried[:, None]
        row_means = jnp.where(carried, row_means, rows @ fresh.mean.T)
        row_covariances = jnp.where(carried, row_covariances, rows @ fresh.covariance)
    scores = row_covariances @ rows[0].T
    writes = row_covariances[0] * decays.since_start[-1]
    if prepared.powers is not None:
        scores = scores * prepared.powers
        writes = writes * prepared.powers[:, None]
    if fresh is not None:
        scores = jnp.where(decays.together, scores, 0)
        writes = jnp.where(decays.last[:, None], writes, 0)
    scores = scores + prepared.open_loop
    if prepared.drifted is not None:
        writes = writes + prepared.drifted
    factor = _factor(scores[0], prepared.between)
    damped = factor if prepared.between is None else factor * prepared.between
    whitened = solve_triangular(factor, prepared.value - row_means[0], lower=True)
    right = jnp.concatenate([jnp.tril(scores[1]).T, writes], axis=1)
    right = solve_triangular(damped, right, lower=True)
    time = rows.shape[1]
    return Solved(
        factor=factor,
        whitened=whitened,
        reads=jnp.tril(right[:, :time].T),
        writes=right[:, time:],
        row_means=row_means,
        row_covariances=row_covariances,
    )


def _end(prepared: Prepared, solved: Solved, start: State, fresh: State | None) -> State:
    end = prepared.decays.since_start[-1]
    if fresh is not None:
        carried = prepared.decays.carried[-1]
        start = jax.tree.map(lambda old, new: jnp.where(carried, old, new), start, fresh)
    covariance = end[:, None] * start.covariance * end
    absorbed = solved.writes
    if prepared.powers is not None:
        covariance = prepared.powers[-1] * covariance
        absorbed = prepared.between[-1][:, None] * absorbed
    covariance = covariance - solved.writes.T @ absorbed
    if prepared.drift_end is not None:
        width = covariance.shape[0]
        covariance = covariance + jnp.diag(jnp.broadcast_to(prepared.drift_end, (width,)))
    mean = start.mean * end + solved.whitened.T @ solved.writes
    return State(mean, (covariance + covariance.T) / 2)


def _built_up(steps: Steps) -> Float[Array, "time wide"]:
    """c_t = λ_t a_t² c_{t-1} + q_t, from nothing at the chunk's start and at resets."""
    squared = steps.decay**2
    if steps.kept is not None:
        squared = squared * steps.kept[:, None]
    if steps.reset is not None:
        squared = jnp.where(steps.reset[:, None], 0, squared)
    width = max(squared.shape[1], steps.drift.shape[1])
    shape = (squared.shape[0], width)

    def combine(left, right):
        factor, sum_ = left
        next_factor, added = right
        return factor * next_factor, next_factor * sum_ + added

    elements = jnp.broadcast_to(squared, shape), jnp.broadcast_to(steps.drift, shape)
    return jax.lax.associative_scan(combine, elements)[1]


def _factor(scores: Square, between: Square | None) -> Square:
    """Return lower L with B = L (L∘Λ)ᵀ in the lower triangle, from B's lower triangle."""
    if between is None:
        lower = jnp.tril(scores, -1)
        symmetric = lower + lower.T + jnp.diag(jnp.diag(scores))
        return jax.lax.linalg.cholesky(symmetric, symmetrize_input=False)
    time = scores.shape[0]
    if time == 1:
        return jnp.sqrt(scores)
    half = time // 2
    first = _factor(scores[:half, :half], between[:half, :half])
    damped = first * between[:half, :half]
    below = solve_triangular(damped, scores[half:, :half].T, lower=True).T
    remaining = scores[half:, half:] - below @ (below * between[half:, :half]).T
    second = _factor(remaining, between[half:, half:])
    return jnp.block([[first, jnp.zeros((half, time - half), scores.dtype)], [below, second]])
