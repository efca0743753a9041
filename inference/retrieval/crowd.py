r"""A value among N others with uniformly random keys of K entries, nothing being forgotten.

**The exact filter.** With $A = I + \rho^{-1} \sum_i u_i u_i^\top$ over the others (the precision),
$h = k^\top A^{-1} k$ and n writes of the target, its weight is
$\varphi(h) = h/(\rho/n + h)$. Three identities hold for every N and K:

1. $\mathrm{tr}(A A^{-1}) = K$ and Sherman-Morrison give, for $m_N = E\,\mathrm{tr} A^{-1}/K = E h$
   and the retention $r_N$ of one write among N others, $m_N = 1 - (N/K)\, r_{N-1}$.
2. The variance of the read-out, V = h/(1 + n h/ρ), is ρ/n times the weight.
3. The sum of the squared weights of some writes is the derivative of V in their noise, so the
   intrusion is $(\rho/n)\,\partial_\rho r$ with the target's own noise ρ/n held.

For K → ∞ at fixed c = N/K, h does not fluctuate, and (1) is the Marchenko-Pastur equation
$m + c\,m/(\rho + m) = 1$. For finite K, h varies, above all with the direction k: by a third among
8 keys of 16 entries. `direction` takes that mean exactly, from log det alone. Let φ = φ(m) of
n = 1; m, φ and J are at ρ, m′, φ′ and J′ at ρ′, and $D(\rho) = \log\det A(\rho)$. Then

$$ E D = K J + J_1 + O(K^{-1}),\quad J = c \ln(1 + m/\rho) - \ln m - 1 + m,\quad
   J_1 = \tfrac12 \ln(1 - c\varphi^2) + c\varphi^2, $$
$$ \mathrm{cov}(D(\rho), D(\rho')) = -2 \ln(1 - c\varphi\varphi') - 2 c\varphi\varphi'. $$

J is stationary in m, and $\rho\,\partial_\rho J = m - 1$. The covariance is a sum over writes, of
what each moves: $\log(1 + u^\top Q u)$, $Q = (\rho A)^{-1}$ of the others, varies about its mean
with the covariance $(2/K) (\mathrm{tr}\,QQ'/K - \mathrm{tr}\,Q\,\mathrm{tr}\,Q'/K^2)$ over
$(1 + m/\rho)(1 + m'/\rho')$. Of i writes that Q and Q′ share, it is a geometric series,
$(2/K)(\psi/(1 - i\psi/K) - \psi)$ with ψ = φφ′. (Gaussian keys lack the −ψ: Bai and Silverstein,
2004, theorem 1.1, where $J_1 = \tfrac12 \ln(1 - c\varphi^2)$. That all have length 1 adds cφ².)
As $\log\det(I + yA^{-1}) = D(\rho') - D(\rho) + K \ln(1 + y)$ at $\rho' = \rho(1 + y)$,

$$ \ln F(y) = -\tfrac{K}{2} (J' - J + \ln(1 + y)) + \tfrac12 \ln\frac{1 - c\varphi\varphi'}
   {1 - c\varphi'^2} + \tfrac{c}{4} (\varphi^2 + 2\varphi\varphi' - 3\varphi'^2). $$

**What the mean still lacks**, O(1/K²), follows from (1), which is exact: if m_N is ε too small, the
retention found with it is $\varphi_m\epsilon$ too small, $\varphi_m = \rho/(\rho + m)^2$, so

$$ (1 + c\varphi_m)\,\epsilon = 1 - c\,r_{N-1} - m_N + O(K^{-3}),\qquad
   m_N = m + \rho\,\partial_\rho J_1/K, $$

and $-\tfrac{K}{2} \int \epsilon\,d\ln\rho$ is added to ln F. What is then left out is O(1/K³).
As ρ → 0 with N < K, h is Beta((K − N)/2, N/2) and the form exact.

**Delta rules, additive memories, independent entries**: means over random keys are products and
sums of means, exact for every K.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .direction import fitted, mean_share, reach
from .one_key import Gains, after, gain_weights

OwnGains = Float[np.ndarray, " own_write"]


class Crowded(NamedTuple):
    """Of a value among N others with uniformly random keys, in expectation over these.

    Args:
        retention: weight of the target in the read-out, summed over its writes.
        intrusion: sum of the squared weights of the others' writes.
    """

    retention: float
    intrusion: float


def exact_crowd(others: int, width: int, noise: float, target: int = 1) -> Crowded:
    r"""The exact filter's, in either order, for keys of K entries.

    The read-out's variance is ρ/n times the retention. Limits: n/(n + ρ) for N ≪ K, about n K/N for
    N ≫ K: a power law, where a delta rule's is exponential. The error is O(1/K³), worst where ρ is
    small and N near K: of the intrusion at ρ = 0.1, N = K, 0.1 % for K = 16 and 0.3 % for K = 8;
    6 % at ρ = 0.01, N = K = 4.

    Args:
        others: N.
        width: K.
        noise: ρ.
        target: n, writes of the target.
    """
    own = noise / target
    retention = _retention(others, width, noise, own)
    slope = derivative(lambda rho: _retention(others, width, rho, own), noise)
    return Crowded(float(np.real(retention)), own * slope)


def limiting_crowd(others: int, width: int, noise: float, target: int = 1) -> Crowded:
    r"""The same as K → ∞ at fixed N/K: the Marchenko-Pastur law alone, with an error of O(1/K)."""

    def weight(rho: Any) -> Any:
        mean = _limit(others / width, rho)[0]
        return mean / (rho / target + mean)

    retention = float(np.real(weight(noise)))
    slope = derivative(lambda rho: rho * weight(rho), noise)
    return Crowded(retention, float(slope - retention**2) / target)


def exact_overload(
    pairs: int, width: int, noise: float, assumed: float | None = None
) -> tuple[float, float]:
    r"""Squared errors of an entry read by a ridge memory of N pairs, and what it states they are.

    Of a query with a new random key: the overload curve. Stated is $m_N(\lambda)$, where λ is the
    noise that the filter takes writes to have. Its true error, bias plus ρ times the squared
    weights, is linear in ρ and is m_N where ρ = λ, and the squared weights are ∂m/∂λ (3), so it is
    $m_N(\lambda) + (\rho - \lambda)\,m_N'(\lambda)$. The error of a value that was stored is ρ
    times the retention that `exact_crowd(pairs - 1, ...)` gives. Errors O(1/K³).

    Args:
        pairs: N.
        width: K.
        noise: ρ of the values written.
        assumed: λ; ρ where left out.

    Returns:
        The mean squared error, and the variance that the filter states.
    """
    taken = noise if assumed is None else assumed

    def mean(rho: Any) -> Any:
        closed, lacking = _mean(pairs, width, rho)
        return closed + lacking

    stated = float(np.real(mean(taken)))
    return stated + (noise - taken) * derivative(mean, taken), stated


def corrected_crowd(
    target: OwnGains, others: Gains, width: int, *, target_last: bool, decay: float = 1.0
) -> Crowded:
    r"""A delta rule's, whose gains do not depend on directions. Exact mean.

    Every later write of another takes a part g (u·z)² of what is left of a direction z, of mean
    g/K, and of its squared length a part of mean g(2 − g)/K. With $t = \sum_i g_i \prod_{j>i} a
    (1 - g_j)$ of the target's own n writes, target first, it keeps $t \prod_i a (1 - g_i/K)$ and
    $\sum_i w_i^2 = \sum_i \frac{g_i^2}{K} \prod_{j>i} a^2 (1 - g_j (2 - g_j)/K)$; target last, it
    keeps t, and the others' weights are $\prod_j a (1 - g_j)$ over its own writes times as large.

    `reset_gains` give, of one write without decay, β(1 − β/K)^N and
    β/(2 − β) (1 − (1 − β(2 − β)/K)^N).

    Args:
        target: gains of the target's writes.
        others: gains of the N others, in their order.
        width: K.
        target_last: as in `TwoKeys`.
        decay: a, at every write.
    """
    left = after(decay**2 * (1 - others * (2 - others) / width))
    intrusion = float(np.sum(others**2 / width * left))
    own = float(gain_weights(target, decay).sum())
    if target_last:
        return Crowded(own, float(np.prod(decay * (1 - target))) ** 2 * intrusion)
    return Crowded(own * float(np.prod(decay * (1 - others / width))), intrusion)


def superposed_crowd(
    others: int, width: int, decay: float = 1.0, *, target_last: bool = False, target: int = 1
) -> Crowded:
    """Where values are added and all decay by a: every other has E w² = a^(2 age)/K. Exact mean."""
    own = np.arange(target) + (0 if target_last else others)
    ages = np.arange(others) + target * target_last
    return Crowded(float(np.sum(decay**own)), float(np.sum(decay ** (2.0 * ages)) / width))


def reset_entry_crowd(others: int, width: int, noise: float, *, target_last: bool) -> Crowded:
    r"""Longhorn's, of a target key that is random too. Exact mean.

    Every later write leaves $1 - \Delta u_j^2$ of entry j, of mean $1 - \Delta/K$ and mean square
    $s = 1 - 2\Delta/K + 3\Delta^2/(K(K + 2))$. Signs of entries are independent, so crossed terms
    vanish. Target first: $\Delta(1 - \Delta/K)^N$ and $\Delta^2/K\,(1 - s^N)/(1 - s)$. Target last:
    Δ, and $\sum_j k_j^2(1 - \Delta k_j^2)^2$ times the intrusion, of mean
    $1 - 6\Delta/(K + 2) + 15\Delta^2/((K + 2)(K + 4))$.
    """
    delta = 1 / (1 + noise)
    square = 1 - 2 * delta / width + 3 * delta**2 / (width * (width + 2))
    intrusion = delta**2 / width * (1 - square**others) / (1 - square)
    if target_last:
        left = 1 - 6 * delta / (width + 2) + 15 * delta**2 / ((width + 2) * (width + 4))
        return Crowded(delta, left * intrusion)
    return Crowded(delta * (1 - delta / width) ** others, intrusion)


def mean_retention(others: int | float, width: int, noise: float) -> float:
    """Retention of `exact_crowd`, of one write among any number of others, whole or not."""
    return float(np.real(_retention(others, width, noise, noise)))


def derivative(function: Any, at: float) -> float:
    """Derivative of an analytic function, to rounding: Im f(x + iε)/ε."""
    step = 1e-25
    return float(np.imag(function(at + 1j * step)) / step)


def _retention(others: int | float, width: int, noise: Any, own_noise: Any) -> Any:
    """Mean weight of a target with its own noise, among others with theirs; it may be complex."""
    load, mean = others / width, float(np.real(_limit(others / width, noise)[0]))

    def closed(place: Any) -> Any:
        return _log_kept(load, width, noise, place)[0]

    end = reach(closed, width, own_noise, 1.0, mean)
    lacking = fitted(lambda place: _mean(others, width, noise * np.exp(place))[1], end)
    gathered = lacking.integral()

    def kept(place: Any) -> tuple[Any, Any]:
        logarithm, slope = _log_kept(load, width, noise, place)
        return logarithm - width / 2 * gathered(place), slope - width / 2 * lacking(place)

    return mean_share(kept, width, own_noise, 1.0, end)


def _mean(others: int | float, width: int, noise: Any) -> tuple[Any, Any]:
    """m_N as J and J₁ give it, and ε."""
    load = others / width
    mean = -2 / width * _log_kept(load, width, noise, 0.0)[1]
    if others < 1:
        return mean, 0 * mean
    limit, weight, _ = _limit(load, noise)
    first = weight / (1 + limit / noise) / limit
    fewer = (others - 1) / width

    def kept(place: Any) -> tuple[Any, Any]:
        return _log_kept(fewer, width, noise, place)

    end = reach(lambda place: kept(place)[0], width, noise, 1.0, float(np.real(limit)))
    retention = mean_share(kept, width, noise, 1.0, end)
    return mean, (1 - load * retention - mean) / (1 + load * first)


def _log_kept(load: float, width: int, noise: Any, place: Any) -> tuple[Any, Any]:
    """Log F at ln(1 + y), without ε, and its slope."""
    before, after = _limit(load, noise), _limit(load, noise * np.exp(place))
    (_, weight, free), (mean, weight_after, free_after) = before, after
    # m, φ and y = cφ² at ρ', and their slopes in ln ρ', by the Marchenko-Pastur equation.
    stiffness = 1 + load * weight_after * (1 - weight_after) / mean
    rise = load * weight_after * (1 - weight_after) / stiffness
    turn = weight_after * (1 - weight_after) * (rise / mean - 1)
    own, both, first = (load * weight_after * one for one in (weight_after, weight, 1.0))
    own_turn, both_turn = 2 * first * turn, load * weight * turn
    logarithm = -width / 2 * (free_after - free + place)
    logarithm = logarithm + np.log((1 - both) / (1 - own)) / 2
    logarithm = logarithm + (load * weight**2 + 2 * both - 3 * own) / 4
    slope = own_turn / (1 - own) / 2 - both_turn / (1 - both) / 2
    return logarithm, slope + (2 * both_turn - 3 * own_turn) / 4 - width / 2 * mean


def _limit(load: float, noise: Any) -> tuple[Any, Any, Any]:
    """m, φ and J at the load c = N/K; the noise may be complex."""
    slope = noise + load - 1
    root = np.sqrt(slope**2 + 4 * noise + 0j)
    mean = np.where(np.real(slope) < 0, root - slope, 4 * noise / (root + slope)) / 2
    free = load * np.log1p(mean / noise) - np.log(mean) - 1 + mean
    return mean, mean / (noise + mean), free
