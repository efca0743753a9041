r"""One key, written again and again: gains, weights of old and new evidence, plateaus.

Delta rules. A write with gain g k takes $M \to M(I - g k k^\top) + g v k^\top$. All gains here
depend on how many writes there were, not on directions.

The predicted variance p along a key that is written at every step goes

$$ p \to f(p) = \frac{a^2 \rho p}{p + \rho} + q = \frac{(a^2 \rho + q) p + q \rho}{p + \rho}, $$

a Möbius map of determinant $(a \rho)^2$ and trace $\rho (1 + a^2) + q$. With

$$ \cosh\theta = \frac{\rho (1 + a^2) + q}{2 a \rho},\qquad
   \theta = 2\,\mathrm{arsinh}\sqrt{\frac{\rho (1 - a)^2 + q}{4 a \rho}} $$

its t-th power is, by Cayley and Hamilton,

$$ f^t(p) = \frac{(a^2 \rho + q - r_t) p + q \rho}{p + \rho - r_t},\qquad
   r_t = a \rho \frac{\sinh((t - 1)\theta)}{\sinh(t\theta)}. $$

θ = 0 without forgetting, where $r_t = \rho (t - 1)/t$ and gains fall as 1/(t + ρ). Else gains
settle at $g = 1 - e^{-\theta}/a$, and the distance to it shrinks by $f' = (a (1 - g))^2 =
e^{-2\theta}$ a write: θ is at once the rate at which old values are overwritten and half the rate
at which the variance settles.
"""

import math

import numpy as np
from jaxtyping import Float

Gains = Float[np.ndarray, " write"]
Key = Float[np.ndarray, " key"]


def reset_gains(writes: int, noise: float) -> Gains:
    """Gains of a reset covariance, β = 1/(1 + ρ): the delta rule's. Exact, whatever the keys."""
    return np.full(writes, 1 / (1 + noise))


def counted_gains(writes: int, noise: float) -> Gains:
    """Gains 1/(t + ρ) of the t-th write: the exact filter's if all keys are one. Exact.

    Also those of the isotropic Kalman Delta Network with count K, whatever the keys.
    """
    return 1 / (np.arange(1, writes + 1) + noise)


def forgetting_gains(writes: int, decay: float, drift: float, noise: float) -> Gains:
    r"""Gains of the exact filter for a key that is written at every step, with decay a, drift q.

    $p_t/(p_t + \rho)$ with $p_t = f^{t-1}(a^2 + q)$ as above; exact. Also those of the isotropic
    Kalman Delta Network with count K. For a key written every m steps, pass `spaced(...)`.

    Args:
        writes: n.
        decay: a > 0.
        drift: q >= 0.
        noise: ρ > 0.
    """
    step = np.arange(1, writes)
    theta = settling_rate(decay, drift, noise)
    if theta == 0:
        ratio = (step - 1) / step
    else:
        ratio = np.exp(-theta) * np.expm1(-2 * (step - 1) * theta) / np.expm1(-2 * step * theta)
    first, pulled = decay**2 + drift, decay * noise * ratio
    later = ((decay**2 * noise + drift - pulled) * first + drift * noise) / (first + noise - pulled)
    predicted = np.concatenate([[first], later])[:writes]
    return predicted / (predicted + noise)


def settling_rate(decay: float, drift: float, noise: float) -> float:
    """θ: old values fade as e^(−θ) a write once gains have settled, variances settle as e^(−2θ)."""
    return 2 * math.asinh(math.sqrt((noise * (1 - decay) ** 2 + drift) / (4 * decay * noise)))


def plateau_gain(decay: float, drift: float, noise: float) -> float:
    r"""Where `forgetting_gains` settle, $1 - e^{-\theta}/a$; 0 without drift. Exact limit.

    The posterior variance $p = \rho g$ solves $a^2 p^2 + (q + \rho(1 - a^2)) p - q\rho = 0$.
    """
    return 1 - math.exp(-settling_rate(decay, drift, noise)) / decay if drift else 0.0


def plateau_variance(decay: float, drift: float, noise: float) -> float:
    """Variance of the read-out of a key that has been written at every step for long, ρ g."""
    return noise * plateau_gain(decay, drift, noise)


def relaxed_variance(variance: float, steps: float, decay: float, drift: float) -> float:
    r"""Variance after so many steps without a write of the key, $a^{2t} p + q_t$. Exact.

    $q_t = q (1 - a^{2t})/(1 - a^2)$: it relaxes to $q/(1 - a^2)$ at the rate a².

    Args:
        variance: p, when the key was last written.
        steps: t.
        decay: a.
        drift: q.
    """
    fade, gathered = spaced(decay, drift, steps)
    return fade**2 * variance + gathered


def spaced(decay: float, drift: float, period: float) -> tuple[float, float]:
    """Decay and drift over `period` steps: a key written every m steps forgets by these a write."""
    if decay == 1:
        return 1.0, drift * period
    return decay**period, drift * (1 - decay ** (2 * period)) / (1 - decay**2)


def fading_gains(writes: int, rate: float, noise: float) -> Gains:
    r"""MesaNet's gains for a key that is written at every step: $1/(\rho + \sum_{i<t} \gamma^i)$.

    Its evidence fades at rate γ, so the precision along the key is $1 + \rho^{-1} \sum_{i<t}
    \gamma^i$, of which the last write gives 1/ρ. Exact.
    """
    return 1 / (noise + np.cumsum(rate ** np.arange(writes)))


def gain_weights(gains: Gains, decay: float = 1.0) -> Gains:
    r"""Weights of values written with one key, $w_i = g_i \prod_{j>i} a (1 - g_j)$. Exact.

    `counted_gains` give $w_i = 1/(n + \rho)$, the average of the evidence; `reset_gains`
    $\beta(a (1 - \beta))^{n-i}$, its recency; settled `forgetting_gains` $g e^{-\theta (n - i)}$.
    """
    return gains * after(decay * (1 - gains))


def precision_weights(noises: Gains) -> Gains:
    r"""The exact filter's weights of values written with one key and unequal noise. Exact.

    $$ w_i = \frac{r_i^{-1}}{1 + \sum_j r_j^{-1}} $$

    The read-out's variance is $1/(1 + \sum_j r_j^{-1})$.
    """
    return 1 / noises / (1 + np.sum(1 / noises))


def entry_weights(key: Key, noises: Gains) -> Gains:
    r"""Kalman Linear Attention's weights of values written with one key. Exact.

    $$ w_i = \sum_j \frac{k_j^2 r_i^{-1}}{1 + k_j^2 \sum_l r_l^{-1}} $$
    """
    squares = key[:, None] ** 2
    return np.sum(squares / noises / (1 + squares * np.sum(1 / noises)), axis=0)


def reset_entry_weights(key: Key, noises: Gains) -> Gains:
    r"""Longhorn's weights of values written with one key. Exact.

    $$ w_i = \sum_j \Delta_i k_j^2 \prod_{l>i} (1 - \Delta_l k_j^2),\quad \Delta_i = 1/(1 + r_i) $$
    """
    return np.sum([gain_weights(square / (1 + noises)) for square in key**2], axis=0)


def writes_to_overwrite(gains: Gains, kept: Gains, written: int) -> int | None:
    r"""Fewest writes of a new value with a key before it outweighs an old one, written m times.

    The weight of a write is its gain times what all later ones keep. Where all have one gain and
    keep f, it is the least n for which $f^n (2 - f^m) < 1$; averages and sums (f → 1) take m + 1.

    Args:
        gains: of all writes, the old value's first.
        kept: what each write keeps of all before it: a(1 − g) where values are corrected, a where
            they are added, γ where evidence fades (then the gains are all alike).
        written: m.

    Returns:
        n, or None if the writes that have gains do not suffice.
    """
    old = new = 0.0
    for place, (gain, keeps) in enumerate(zip(gains, kept, strict=True)):
        is_old = place < written
        old, new = keeps * old + gain * is_old, keeps * new + gain * (not is_old)
        if new > old * (1 + 1e-9):
            return place + 1 - written
    return None


def after(factors: Gains) -> Gains:
    """Product of all factors after each."""
    return np.append(np.cumprod(factors[:0:-1])[::-1], 1.0)[: len(factors)]
