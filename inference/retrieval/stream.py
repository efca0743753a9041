r"""The exact filter of random keys with decay, drift and unequal noise, for keys of K entries.

In dual form, write i at time $t_i$ observes $S_{t_i} u_i$, and the rows of S are Gaussian in time
with covariance C(s, t) I (`prior_covariance`), so weights of a read-out at time T are those of
kernel regression with the Gram matrix $C(t_i, t_j)\,u_i^\top u_j + r_i \delta_{ij}$
(`exact_weights`: algebra, for any keys).

For random keys let B be the covariance of (time, key) given the others' writes,
$P_{st} = E\,\mathrm{tr} B_{st}/K$, and $h_{ti} = u_i^\top B^{(-i)}_{ti} u_i$ without write i. Then
$\mathrm{tr}(B B^{-1})$ and Sherman-Morrison give, for every N and K,

$$ P = C - \frac{1}{K} \sum_i E\!\left[\frac{h_{\cdot i}}{r_i + h_{ii}}\right] C_{t_i \cdot}. $$

**Leading order.** h does not fluctuate, and with $R_i = 1/(r_i + P_{ii})$

$$ P = (C^{-1} + \mathrm{diag}(R)/K)^{-1}: $$

each entry of the memory is smoothed as a scalar that is observed with noise $K (r + P_{tt})$, its
own uncertainty counted K-fold as noise. At C = 1 this is Marchenko-Pastur's equation.

**First correction.** With $W = (I - (P \circ P) R^2/K)^{-1}$ over the others' times, the response
of the fixed point to a precision ε put on time i gives $\mathrm{tr}(B_{ti} B_{ii})/K = P_{ti}
P_{ii} + X_{ti}$, $X = P R^2 (W (P \circ P) \circ P)/K$. From it come leaving out write i,
$P^{(-i)}_{ti} = P_{ti} + (P_{ti} P_{ii} + X_{ti}) R_i/K$; the fluctuations over keys,
$\mathrm{cov}(h_{ti}, h_{ii}) = 2 X_{ti}/(K + 2)$; and the response of R to all of these.
The target's key k is independent of B, so its weights are w = G c with
$G = (H + r)^{-1}$, where $H, c$ are $k^\top B_{st} k$ among its own times and the time of reading.
To second order in their fluctuations δ, with $\bar r = e_T - G c$,

$$ E\sum w = 1^\top G c - Q(\bar r, G 1),\qquad
   V = P_{TT} - c^\top G c - Q(\bar r, \bar r),\qquad Q(x, y) = E\,x^\top \delta\,G\,\delta\,y, $$

and the derivative of V in the others' noise is the sum of their squared weights, as in `crowd`.

**Beyond it.** Where the others are few, $h_{tt}$ of the target at its own times varies by a third,
and an expansion in its fluctuation z is of little use. Along z, all fluctuations follow by
regression, $\delta = b z$, $b = \mathrm{cov}(\delta, z)/\mathrm{var}\,z$. If the target's writes
follow each other and C is Markov, this is not an approximation among its own times: all are known
through one. Weights and V are then rational in z with one pole, at

$$ z = -w,\qquad w = \frac{\rho^\top G \rho}{\rho^\top G\,b\,G \rho},\quad \rho = b\,\bar r, $$

(the Padé form of the second and third derivative), so that in place of $-Q(x, y)$ stands
$-Q(x, y) - x^\top b\,G\,b\,y\,(w^3 E[(w + z)^{-1}] - w^2 - \mathrm{var}\,z)$: what `direction` says
of the mean of $1/(\sigma + h_{tt})$, $\sigma = w - E h_{tt}$, less what Q has of it. (Its h, whose
mean differs from $E h_{tt}$ by O(1/K²), is scaled to have that mean.) There
log det(I + y B_tt) is that of the Gram matrices with and without an observation of all entries at t
with precision y, which leaves the covariance in time
$C' = C - C_{\cdot t} C_{t \cdot}/(C_{tt} + 1/y)$:

$$ E\Lambda = K \ln(1 + y C_{tt}) + \Phi(C') - \Phi(C),\quad \Phi = K \ln\det(I + C R/K) -
   \sum_i (\ln R_i + 1 - r_i R_i) + \tfrac12 \ln\det(I - \Psi) + \mathrm{tr}\,\Psi, $$
$$ \mathrm{cov} = -2 \ln\det(I - \Psi) - 2\,\mathrm{tr}\,\Psi,\qquad
   \Psi_{ij} = R_i R'_i P_{ij} P'_{ij}/K, $$

as in `crowd`; P, R for one of the two, P′, R′ for the other, in Φ the same. The error is still
O(1/K²), but what makes it large where the others are few is summed to all orders. Less is gained
where the target's writes are scattered among others and the memory drifts; where w < E h there is
no such pole, and Q is left as it is, as for K < 4.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .direction import fitted, mean_inverse, reach
from .one_key import Gains, Key, relaxed_variance

Covariance = Float[np.ndarray, "time time"]


class Streamed(NamedTuple):
    """Of a value among others with uniformly random keys, in expectation over these.

    Args:
        retention: weight of the target in the read-out, summed over its writes.
        intrusion: sum of the squared weights of the others' writes.
        variance: of the read-out, which is also its mean squared error.
    """

    retention: float
    intrusion: float
    variance: float


def prior_covariance(writes: int, decay: float, drift: float) -> Covariance:
    r"""Covariance in time of an entry of the memory at its writes, $a^{|s - t|} v_{\min(s, t)}$.

    $v_t$ is `relaxed_variance` after t steps from 1: the first write comes after a first step.
    """
    step = np.arange(writes)
    variances = np.array([relaxed_variance(1.0, float(t), decay, drift) for t in 1.0 + step])
    earlier = np.minimum.outer(step, step)
    return decay ** np.abs(np.subtract.outer(step, step)) * variances[earlier]


def exact_weights(
    keys: Float[np.ndarray, "write key"], query: Key, noises: Gains, covariance: Covariance
) -> tuple[Gains, float]:
    r"""The exact filter's weights in dual form, and the variance of its read-out. Algebra.

    $$ w = (C \circ U U^\top + \mathrm{diag}(r))^{-1} (C_{\cdot T} \circ U x) $$

    Args:
        keys: U, of every write; any keys.
        query: x, read right after the last write.
        noises: r of every write.
        covariance: C, as `prior_covariance`.
    """
    shown = covariance[-1] * (keys @ query)
    weights = np.linalg.solve(covariance * (keys @ keys.T) + np.diag(noises), shown)
    return weights, float(covariance[-1, -1] * (query @ query) - shown @ weights)


def forgetting_crowd(
    target: int,
    others: int,
    width: int | float,
    noise: float,
    *,
    decay: float = 1.0,
    drift: float = 0.0,
    target_last: bool = False,
) -> Streamed:
    """A value written n times, before or after N others, under the exact filter that forgets.

    Error O(1/K²), for any decay and drift.

    Args:
        target: n, writes of the target, one after the other.
        others: N.
        width: K.
        noise: ρ.
        decay: a, at every write.
        drift: q, at every write.
        target_last: as in `TwoKeys`.
    """
    writes = target + others
    is_target = np.arange(writes) < target
    is_target = is_target[::-1] if target_last else is_target
    covariance = prior_covariance(writes, decay, drift)
    return exact_stream(covariance, is_target, np.full(writes, noise), width)


def fading_crowd(
    target: int,
    others: int,
    width: int | float,
    noise: float,
    rate: float,
    *,
    target_last: bool = False,
) -> Streamed:
    r"""MesaNet's: its evidence fades at rate γ.

    So a write of age t has the noise $\rho\gamma^{-t}$. The variance is what it states.
    Error O(1/K²).
    """
    writes = target + others
    is_target = np.arange(writes) < target
    is_target = is_target[::-1] if target_last else is_target
    noises = noise * rate ** -np.arange(writes, dtype=float)[::-1]
    return exact_stream(np.ones((writes, writes)), is_target, noises, width)


def exact_stream(
    covariance: Covariance, is_target: np.ndarray, noises: Gains, width: int | float
) -> Streamed:
    """A target among others with random keys: any covariance in time, any noise.

    The error is O(1/K²), worst where the noise is small and others are about K: of the intrusion at
    ρ = 0.1 without forgetting, 0.1 % for N = K/2 and 0.6 % for N = K if K = 16, 2 % if K = 8;
    at ρ = 0.01 and N = K, 1 % and 6 %.

    Args:
        covariance: C over the times of all writes; the read-out comes right after the last.
        is_target: whether each write is one of the target's key.
        noises: r of every write.
        width: K.
    """
    own, rest = np.flatnonzero(is_target), np.flatnonzero(~is_target)
    # Times in the order: the others', the target's, the reading.
    order = np.concatenate([rest, own, [len(is_target) - 1]])
    ordered = covariance[np.ix_(order, order)]
    count = len(rest)

    # The others' squared weights are the derivative of the variance in their noise.
    step = 1e-25
    retention, variance = _moments(
        ordered, count, noises[rest] + 1j * step, noises[own] + 0j, width
    )
    return Streamed(
        float(np.real(retention)),
        max(float(np.imag(variance)) / step, 0.0),
        float(np.real(variance)),
    )


def _moments(covariance, count: int, noises, own_noises, width: int | float) -> tuple[Any, Any]:
    """Mean retention, and mean variance."""
    smoothed, rates, softness = _smoothed(covariance, count, noises, width)
    stiffness = np.linalg.inv(softness)
    corrected = smoothed + _correction(smoothed, rates, stiffness, width)
    own = slice(count, len(covariance) - 1)
    gram = np.linalg.inv(corrected[own, own] + np.diag(own_noises))
    shown = corrected[own, -1]
    weights, ones = gram @ shown, gram.sum(axis=1)
    among = smoothed[count:, :count]  # of the target's times and the reading's with the others'
    residual, summed = np.append(-weights, 1.0), np.append(ones, 0.0)
    inner = among[:-1].T @ gram @ among[:-1]
    ladder = rates[:, None] ** 2 * stiffness  # symmetric
    curved = ladder / np.outer(rates, rates)

    def varied(first, second):
        """Q: both pairings of the fluctuations, as the response of the fixed point gives them."""
        left, right = rates * (first @ among), rates * (second @ among)
        return (
            left @ (right * (stiffness @ np.diag(inner))) + left @ ((curved * inner) @ right)
        ) / (width * (width + 2))

    retention = weights.sum() - varied(residual, summed)
    variance = corrected[-1, -1] - shown @ weights - varied(residual, residual)
    # z is of the target's time that varies most.
    spreads = np.einsum("ti,ij,tj->t", among[:-1] ** 2, ladder, among[:-1] ** 2)
    place = int(np.argmax(np.real(spreads)))
    if np.real(spreads[place]) <= 0 or width < 4:
        return retention, variance
    along = among * among[place]
    moved = (along @ ladder @ along.T)[:-1] / spreads[place]
    pulled = gram @ (moved @ residual)
    pole = (moved @ residual) @ pulled / (pulled @ moved[:, :-1] @ pulled)
    mean = corrected[count + place, count + place]
    if not 0 < np.real(mean) < np.real(pole):
        return retention, variance
    inverse = _inverse_mean(covariance, count, noises, width, count + place, mean, pole - mean)
    beyond = pole**3 * inverse - pole**2 - 2 * spreads[place] / (width * (width + 2))
    return (
        retention - beyond * (moved @ summed) @ pulled,
        variance - beyond * (moved @ residual) @ pulled,
    )


def _inverse_mean(
    covariance, count: int, noises, width: int | float, time: int, mean, noise
) -> Any:
    """E[1/(σ + h)], of h at the time, whose mean is given."""
    largest, seen, guess = float(covariance[time, time]), covariance[time], float(np.real(mean))
    free, smoothed, rates = _free(covariance, count, noises, width)

    def log_kept(place):
        known = covariance - np.outer(seen, seen) * (-np.expm1(-place) / largest)
        free_known, smoothed_known, rates_known = _free(known, count, noises, width, smoothed)
        before, both, after = (
            _pairs(first, second, width)
            for first, second in (
                ((smoothed, rates), (smoothed, rates)),
                ((smoothed, rates), (smoothed_known, rates_known)),
                ((smoothed_known, rates_known), (smoothed_known, rates_known)),
            )
        )
        logarithm = -(width * place + free_known - free) / 2
        logarithm = logarithm + (both[0] - after[0]) / 2
        return logarithm + (before[1] + 2 * both[1] - 3 * after[1]) / 4

    end = reach(log_kept, width, noise, largest, guess)
    kept = fitted(log_kept, _MARGIN * end)
    # h is taken as large as its mean is, so that 1/(σ + h) stays that of the target's noise.
    near = _NEAR / guess  # small enough a y for the slope of log F at 0
    first, second = (log_kept(np.log1p(step * near * largest)) for step in (1, 2))
    scale = (second - 4 * first) / (width * near) / mean
    limit = np.log1p(largest / (noise * scale))
    end = limit if np.real(limit) < _MARGIN * np.real(end) else end
    return scale * mean_inverse(kept, width, noise * scale, largest, end)


def _free(
    covariance, count: int, noises, width: int | float, near: Any = None
) -> tuple[Any, Any, Any]:
    """Φ at leading order, with P and R of the others."""
    smoothed, rates, _ = _smoothed(covariance, count, noises, width, near)
    free = width * _log_determinant(-covariance[:count, :count] * rates / width)
    free = free - np.sum(np.log(rates) + 1 - noises * rates)
    return free, smoothed[:count, :count], rates


def _pairs(first, second, width: int | float) -> tuple[Any, Any]:
    """Log det(I − Ψ) and tr Ψ."""
    pairs = first[0] * second[0] * (first[1] * second[1]) / width
    return _log_determinant(pairs), np.trace(pairs)


def _log_determinant(matrix) -> Any:
    """Of I − matrix."""
    sign, size = np.linalg.slogdet(np.eye(len(matrix)) - matrix)
    return np.log(sign) + size


def _smoothed(
    covariance, count: int, noises, width: int | float, near: Any = None
) -> tuple[Any, Any, Any]:
    """P, R and W⁻¹ at leading order, by Newton's method on the diagonal of P, from one near it."""
    among, across = covariance[:count, :count], covariance[:, :count]
    identity = np.eye(count)

    def settled(variances, noises):
        rates = 1 / (noises + variances)
        gathered = np.linalg.solve(np.diag(width / rates) + among, across.T)
        smoothed = covariance - across @ gathered
        overlap = smoothed[:count, :count] ** 2 * rates**2 / width
        return smoothed, rates, identity - overlap

    def step(variances, noises):
        smoothed, _, softness = settled(variances, noises)
        return np.linalg.solve(softness, np.diag(smoothed)[:count] - variances)

    variances = np.real(np.diag(among) if near is None else np.diag(near))
    for _ in range(_MOST_STEPS):
        moved = step(variances, np.real(noises))
        variances = variances + moved
        if not count or np.max(np.abs(moved) / np.abs(variances)) < _SETTLED:
            break
    # One more squares what is left, and is exact where noises are complex by a little.
    variances = variances + step(variances, noises)
    return settled(variances, noises)


def _correction(smoothed, rates, stiffness, width: int | float):
    """P's first correction: leaving out each write, fluctuations over keys, the response of R."""
    count = len(rates)
    if not count:
        return np.zeros_like(smoothed)
    across, among = smoothed[:, :count], smoothed[:count, :count]
    own = np.diag(among)
    response = stiffness @ among**2
    excess = across @ (rates[:, None] ** 2 * response * among) / width
    own_excess = np.diag(excess[:count])
    left_out = (excess + across * own) * rates**2
    left_out = left_out - across * rates**3 * (own_excess + own**2)
    varied = across * own_excess * rates**3 - excess * rates**2
    moved = left_out + 2 * width / (width + 2) * varied
    change = -(moved @ across.T) / width**2
    followed = stiffness @ np.diag(change)[:count]
    change = change + across * (rates**2 * followed) @ across.T / width
    return (change + change.T) / 2


_MOST_STEPS, _SETTLED, _MARGIN, _NEAR = 60, 1e-6, 1.1, 1e-4
