r"""A value among N others with uniformly random keys of K entries, nothing being forgotten.

**The exact filter.** With $A = I + \rho^{-1} \sum_i u_i u_i^\top$ over the others (the precision),
$h = k^\top A^{-1} k$ and n writes of the target, its weight is
$\varphi(h) = h/(\rho/n + h)$. Three identities hold for every N and K:

1. $\mathrm{tr}(A A^{-1}) = K$ and Sherman-Morrison give, for $m_N = E\,\mathrm{tr} A^{-1}/K = E h$
   and the retention $r_N$ of one write among N others, $m_N = 1 - (N/K)\, r_{N-1}$.
2. The variance of the read-out, V = h/(1 + n h/ρ), is ρ/n times the weight.
3. $\partial V/\partial\rho$ is the sum of the squared weights of all writes, so the intrusion is
   $\partial_\rho(\rho\,r/n) - E[\varphi^2]/n$.

For K → ∞ at fixed c = N/K, h does not fluctuate, and (1) is the Marchenko-Pastur equation
$m + c\,m/(\rho + m) = 1$. For finite K, over the direction k,
$\mathrm{var}\,h = 2 (\tau - m^2)/(K + 2)$ with $\tau = E\,\mathrm{tr} A^{-2}/K$ (tr A⁻¹/K itself
varies by O(1/K)), $\tau = m/(1 + c\varphi')$ to leading order, and
$m_{N-1} = m_N + \varphi/(K (1 + c\varphi'))$. Put into (1), with φ of n = 1,

$$ m_N = m + \frac{\delta}{K} + O(K^{-2}),\qquad
   \delta = -c\,\frac{\varphi\varphi'/(1 + c\varphi') + \varphi''(\tau - m^2)}{1 + c\varphi'}, $$
$$ E\,\varphi(h) = \varphi(m) + \frac{\varphi'\delta}{K} + \frac{\varphi''(\tau - m^2)}{K + 2} +
   O(K^{-2}). $$

**Delta rules, additive memories, independent entries**: means over random keys are products and
sums of means, exact for every K.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

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
    r"""The exact filter's, in either order, with its correction for keys of K entries.

    The read-out's variance is ρ/n times the retention. Limits: n/(n + ρ) for N ≪ K, about n K/N for
    N ≫ K: a power law, where a delta rule's is exponential. The error is O(1/K²), worst where ρ is
    small and N near K.

    Args:
        others: N.
        width: K.
        noise: ρ.
        target: n, writes of the target.
    """
    retention, square = _retention(others, width, noise, target)
    slope = derivative(lambda rho: rho * _retention(others, width, rho, target)[0], noise)
    return Crowded(float(retention), max(float(slope - square) / target, 0.0))


def limiting_crowd(others: int, width: int, noise: float, target: int = 1) -> Crowded:
    r"""The same as K → ∞ at fixed N/K: the Marchenko-Pastur law alone, with an error of O(1/K)."""

    def weight(rho: Any) -> Any:
        mean, _, _ = _bulk(others / width, rho)
        return mean / (rho / target + mean)

    retention = weight(noise)
    slope = derivative(lambda rho: rho * weight(rho), noise)
    return Crowded(float(retention), float(slope - retention**2) / target)


def exact_overload(
    pairs: int, width: int, noise: float, assumed: float | None = None
) -> tuple[float, float]:
    r"""Squared errors of an entry read by a ridge memory of N pairs, and what it states they are.

    Of a query with a new random key: the overload curve. Stated is $m_N(\lambda)$, where λ is the
    noise that the filter takes writes to have. Its true error, bias plus ρ times the squared
    weights, is linear in ρ and is m_N where ρ = λ, and the squared weights are ∂m/∂λ (3), so it is
    $m_N(\lambda) + (\rho - \lambda)\,m_N'(\lambda)$. The error of a value that was stored is ρ
    times the retention that `exact_crowd(pairs - 1, ...)` gives. Errors O(1/K²).

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
        limit, _, shift = _bulk(pairs / width, rho)
        return limit + shift / width

    stated = float(mean(taken))
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
    return float(_retention(others, width, noise, 1)[0])


def derivative(function: Any, at: float) -> float:
    """Derivative of an analytic function, to rounding: Im f(x + iε)/ε."""
    step = 1e-25
    return float(np.imag(function(at + 1j * step)) / step)


def _bulk(load: float, noise: Any) -> tuple[Any, Any, Any]:
    """m, τ and δ at the load c = N/K; the noise may be complex."""
    slope = noise + load - 1
    root = np.sqrt(slope**2 + 4 * noise + 0j)
    mean = (root - slope) / 2 if np.real(slope) < 0 else 2 * noise / (root + slope)
    weight, first, second = _weight(mean, noise)
    stiffness = 1 + load * first
    spread = mean / stiffness
    moved = weight * first / stiffness + second * (spread - mean**2)
    return _real(mean, noise), _real(spread, noise), _real(-load * moved / stiffness, noise)


def _weight(mean: Any, noise: Any) -> tuple[Any, Any, Any]:
    """φ and its two derivatives."""
    total = noise + mean
    return mean / total, noise / total**2, -2 * noise / total**3


def _retention(others: int | float, width: int, noise: Any, target: int) -> tuple[Any, Any]:
    """E φ and E φ²."""
    mean, spread, shift = _bulk(others / width, noise)
    weight, first, second = _weight(mean, noise / target)
    varied = (spread - mean**2) / (width + 2)
    retention = weight + first * shift / width + second * varied
    return retention, retention**2 + 2 * first**2 * varied


def _real(number: Any, noise: Any) -> Any:
    return number if np.iscomplexobj(noise) else np.real(number)
