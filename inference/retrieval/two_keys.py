r"""A target value and another, each written with a key of its own, and the target's key read."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .one_key import Gains, Key, gain_weights


@dataclass(frozen=True)
class TwoKeys:
    """A target value and another, each written with a key of its own, and the target's key read.

    Args:
        target: m, how often the target is written.
        other: n, how often the other is written.
        overlap: c, cosine between the two keys; 1 where they are one key.
        target_last: the other's writes come first (they interfere proactively), rather than the
            target's (the other's interfere retroactively).
    """

    target: int
    other: int
    overlap: float
    target_last: bool = False


class Weights(NamedTuple):
    """Weights in the read-out: of the target, summed over its writes, and of the other."""

    target: float
    other: float


def exact_two_keys(case: TwoKeys, noise: float) -> Weights:
    r"""Weights under the exact filter, which do not depend on the order. Exact.

    m writes with noise ρ are one with noise ρ/m, so with the kernel matrix of ridge regression

    $$ (w_0, w) = (1, c) \begin{pmatrix} 1 + \rho/m & c \\ c & 1 + \rho/n \end{pmatrix}^{-1}
       = \frac{(m (n (1 - c^2) + \rho),\; c \rho n)}{(m + \rho)(n + \rho) - m n c^2}. $$

    With one key (c = 1) it is m/(m + n + ρ) and n/(m + n + ρ); for n → ∞ the target keeps
    (1 − c²)/(1 + ρ/m − c²).
    """
    m, n, c = case.target, case.other, case.overlap
    determinant = (m + noise) * (n + noise) - m * n * c**2
    return Weights(m * (n * (1 - c**2) + noise) / determinant, c * noise * n / determinant)


def corrected_two_keys(case: TwoKeys, gains: Gains, decay: float = 1.0) -> Weights:
    r"""Weights under a delta rule whose gains do not depend on directions. Exact.

    Writes of one key multiply, $\prod_i a (I - g_i k k^\top) = a^n (I - (1 - f) k k^\top)$ with
    $f = \prod_i (1 - g_i)$, and add $t = \sum_i g_i \prod_{j>i} a (1 - g_j)$ (1 − f without
    decay). So with $f_1, t_1$ of the first key and $f_2, t_2$ of the second, and n writes of the
    second, target first: $t_1 a^n (1 - c^2 (1 - f_2))$ and $c t_2$; target last: $t_2$ and
    $c t_1 a^n f_2$.

    Args:
        case: what is written.
        gains: of all m + n writes, in their order.
        decay: a, at every write.
    """
    first = case.other if case.target_last else case.target
    earlier, later = gains[:first], gains[first:]
    total_first, total_second = gain_weights(earlier, decay).sum(), gain_weights(later, decay).sum()
    kept, faded, c = np.prod(1 - later), decay ** len(later), case.overlap
    if case.target_last:
        return Weights(float(total_second), float(c * total_first * faded * kept))
    retained = total_first * faded * (1 - c**2 * (1 - kept))
    return Weights(float(retained), float(c * total_second))


def superposed_two_keys(case: TwoKeys, decay: float = 1.0) -> Weights:
    """Weights where values are added and all decay by a: Σ a^age, and c Σ a^age of the other."""
    ages = decay ** np.arange(case.target + case.other)[::-1]
    first, second = np.split(ages, [case.other if case.target_last else case.target])
    target, other = (second, first) if case.target_last else (first, second)
    return Weights(float(target.sum()), float(case.overlap * other.sum()))


def entry_two_keys(case: TwoKeys, target: Key, other: Key, noise: float) -> Weights:
    r"""Weights under the exact filter of independent entries: Kalman Linear Attention.

    Entry j alone is a regression of the values on $k_j$ and $u_j$, so

    $$ w_0 = \sum_j \frac{m k_j^2}{\rho + m k_j^2 + n u_j^2},\quad
       w = \sum_j \frac{n k_j u_j}{\rho + m k_j^2 + n u_j^2}. $$

    Args:
        case: what is written; its overlap is that of the two keys given.
        target: k.
        other: u.
        noise: ρ.
    """
    precision = noise + case.target * target**2 + case.other * other**2
    return Weights(
        float(np.sum(case.target * target**2 / precision)),
        float(np.sum(case.other * target * other / precision)),
    )


def reset_entry_two_keys(case: TwoKeys, target: Key, other: Key, noise: float) -> Weights:
    r"""Weights under Longhorn: entries with a reset covariance, Δ = 1/(1 + ρ).

    Entry j goes $m_j \to (1 - \Delta k_j^2) m_j + \Delta k_j v$. With $f_j = (1 - \Delta k_j^2)^m$
    and $h_j = (1 - \Delta u_j^2)^n$, target first: $\sum_j (1 - f_j) h_j$ and
    $\sum_j k_j (1 - h_j)/u_j$; target last: $\sum_j (1 - f_j)$ and $\sum_j k_j (1 - h_j) f_j/u_j$.

    Args:
        case: what is written; its overlap is that of the two keys given.
        target: k.
        other: u, without zeros.
        noise: ρ.
    """
    strength = 1 / (1 + noise)
    kept_target = (1 - strength * target**2) ** case.target
    kept_other = (1 - strength * other**2) ** case.other
    shown = target * (1 - kept_other) / other
    if case.target_last:
        return Weights(float(np.sum(1 - kept_target)), float(np.sum(shown * kept_target)))
    return Weights(float(np.sum((1 - kept_target) * kept_other)), float(np.sum(shown)))
