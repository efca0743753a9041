r"""Squared error of an entry of a read-out, of values that the memory's model draws.

Entries of S start standard normal, decay and drift as the model says, and $S_T x$ is wanted,
for a unit x. The exact filter's error is the variance it states (`crowd.exact_overload`,
`stream.forgetting_crowd`). For the others, with the error E = M − S and $C = E[E^\top E]$
per row, all that random keys leave of C are $s = k^\top C k$ along the target's key and
$T = \mathrm{tr} C/K$.
"""

import numpy as np
from jaxtyping import Float

from .crowd import OwnGains, derivative
from .one_key import Gains, Key
from .stream import Covariance


def read_error(
    weights: Gains,
    keys: Float[np.ndarray, "write key"],
    query: Key,
    noises: Gains,
    covariance: Covariance | None = None,
) -> float:
    r"""Mean squared error of a read-out from its weights. Algebra.

    Without forgetting $\|x - \sum_i w_i k_i\|^2 + \sum_i w_i^2 r_i$. It is least for the exact
    filter, whose own variance it is.

    Args:
        weights: of every write.
        keys: of every write.
        query: x, what is read right after the last write.
        noises: r, variance of every write.
        covariance: in time, as `prior_covariance`; all ones where left out.
    """
    if covariance is None:
        left = query - weights @ keys
        return float(left @ left + np.sum(weights**2 * noises))
    seen = covariance[-1, -1] * (query @ query) - 2 * weights @ (covariance[-1] * (keys @ query))
    return float(seen + weights @ (covariance * (keys @ keys.T)) @ weights + weights**2 @ noises)


def corrected_error(
    target: OwnGains,
    others: Gains,
    width: int,
    noise: float,
    *,
    decay: float = 1.0,
    drift: float = 0.0,
    target_last: bool = False,
) -> float:
    r"""A delta rule's error along the target's key, among others with random keys. Exact mean.

    Every step takes $(s, T) \to (a^2 s + q, a^2 T + q)$. A write of the target then gives
    $s \to (1 - g)^2 s + g^2\rho$ and $T \to T - (g(2 - g) s - g^2\rho)/K$; one of another, over its
    key, $s \to (1 - 2g/K + 2g^2/(K(K + 2)))\,s + g^2 T/(K + 2) + g^2\rho/K$ and
    $T \to (1 - g(2 - g)/K)\,T + g^2\rho/K$.

    Args:
        target: gains of the target's writes.
        others: gains of the others'.
        width: K.
        noise: ρ of the values written.
        decay: a, of the memory and of what is remembered.
        drift: q, of what is remembered.
        target_last: as in `TwoKeys`.
    """
    writes = [(gain, True) for gain in target], [(gain, False) for gain in others]
    first, then = writes[::-1] if target_last else writes
    along = overall = 1.0
    for gain, is_target in [*first, *then]:
        along, overall = decay**2 * along + drift, decay**2 * overall + drift
        added = gain**2 * noise
        if is_target:
            overall -= (gain * (2 - gain) * along - added) / width
            along = (1 - gain) ** 2 * along + added
        else:
            kept = 1 - 2 * gain / width + 2 * gain**2 / (width * (width + 2))
            along = kept * along + gain**2 * overall / (width + 2) + added / width
            overall = (1 - gain * (2 - gain) / width) * overall + added / width
    return float(along)


def reset_overload(
    pairs: int, width: int, noise: float, gain: float, decay: float = 1.0, drift: float = 0.0
) -> float:
    r"""A delta rule's error after N random pairs, of a query with a new random key. Exact mean.

    $T \to \mu (a^2 T + q) + \beta^2\rho/K$ with $\mu = 1 - \beta(2 - \beta)/K$, so
    $T_N = T_\infty + (1 - T_\infty)(\mu a^2)^N$ with
    $T_\infty = (\mu q + \beta^2\rho/K)/(1 - \mu a^2)$. With nothing forgotten and
    β = 1/(1 + ρ) it is ρ/(1 + 2ρ), whatever the load.
    """
    kept = 1 - gain * (2 - gain) / width
    rate = kept * decay**2
    settled = (kept * drift + gain**2 * noise / width) / (1 - rate)
    return settled + (1 - settled) * rate**pairs


def reset_stored_error(
    pairs: int, width: int, noise: float, gain: float, decay: float = 1.0, drift: float = 0.0
) -> Float[np.ndarray, " age"]:
    r"""A delta rule's error of each of N stored pairs, the last one first. Exact mean.

    s − T fades by $\lambda = a^2 (1 - 2\beta/K + 2\beta^2/(K(K + 2)))$ a write, so at age j

    $$ s_j = T_N - \lambda^j \left(T_{N-j} - (1 - \beta)^2 T^-_{N-j} - \beta^2\rho\right), $$

    with $T^-_n = a^2 T_{n-1} + q$ before the n-th write (`reset_overload`).
    """
    rate = decay**2 * (1 - 2 * gain / width + 2 * gain**2 / (width * (width + 2)))
    overall = np.array(
        [reset_overload(n, width, noise, gain, decay, drift) for n in range(pairs + 1)]
    )
    before = decay**2 * overall[:-1] + drift
    gap = overall[1:] - (1 - gain) ** 2 * before - gain**2 * noise
    return overall[-1] - rate ** np.arange(pairs) * gap[::-1]


def superposed_error(
    target: int,
    others: int,
    width: int,
    noise: float,
    covariance: Covariance,
    decay: float = 1.0,
    *,
    target_last: bool = False,
) -> float:
    r"""Error along the target's key where values are added and all decay. Exact mean.

    The weight of write i is $\alpha_i = a^{age}$, times $u_i \cdot k$ of another, and means over
    random keys are 1/K for a pair that shares one other key, 1/K² for two others' keys:

    $$ C_{TT} - 2\sum_i \kappa_i \alpha_i C_{Ti} + \sum_{ij} \kappa_{ij} \alpha_i \alpha_j C_{ij} +
       \rho \sum_i \kappa_i \alpha_i^2. $$

    Args:
        target: n, writes of the target.
        others: N.
        width: K.
        noise: ρ of the values written.
        covariance: C in time, of what is remembered.
        decay: a, of the memory.
        target_last: as in `TwoKeys`.
    """
    writes = target + others
    is_target = np.arange(writes) < target
    is_target = is_target[::-1] if target_last else is_target
    shares = np.where(is_target, 1.0, 1 / width)
    ages = decay ** np.arange(writes, dtype=float)[::-1]
    pairs = np.outer(shares, shares)
    pairs[np.diag_indices(writes)] = shares
    own = np.sum(ages**2 * shares)
    both = ages @ (pairs * covariance) @ ages
    return float(covariance[-1, -1] - 2 * (shares * ages) @ covariance[-1] + both + noise * own)


def superposed_overload(pairs: int, width: int, noise: float) -> float:
    r"""Error of an additive memory of N random pairs, of a query with a new random key. Exact mean.

    $1 - N/K + N(N - 1)/K^2 + \rho N/K$: without a decay it grows as the load squared.
    """
    load = pairs / width
    return 1 - load + pairs * (pairs - 1) / width**2 + noise * load


def untold_error(noises: Gains) -> tuple[float, float]:
    r"""The exact filter's error of one key where it is told each write's noise, or their mean only.

    Told: $1/(1 + \sum_i 1/r_i)$. Told the mean $\bar r$: all weights are $1/(n + \bar r)$, and
    the error is $(\bar r^2 + n \bar r)/(n + \bar r)^2 = \bar r/(n + \bar r)$. Algebra. It is what
    the filter states in both cases; the second is larger, as an arithmetic mean is than a harmonic
    one.
    """
    mean = float(np.mean(noises))
    return 1 / (1 + float(np.sum(1 / noises))), mean / (len(noises) + mean)


def misjudged_error(variance, noise: float, assumed: float) -> float:
    r"""True error of an exact filter that takes writes to have the noise λ where they have ρ.

    $V(\lambda) + (\rho - \lambda) V'(\lambda)$ for the variance V that it states: the error is
    linear in ρ with the sum of the squared weights as its slope, which is V'. As exact as V is.

    Args:
        variance: V, an analytic function of λ.
        noise: ρ.
        assumed: λ.
    """
    return float(np.real(variance(assumed))) + (noise - assumed) * derivative(variance, assumed)
