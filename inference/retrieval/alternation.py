r"""Two keys of cosine c that are written in turn, n times each, and the first one read.

Delta rules. With read-outs $(x_1, x_2) = (M k_1, M k_2)$ a write of $k_1$, then one of $k_2$, takes
$x \to F x$ plus what the values add, where

$$ F = a^2 \begin{pmatrix} 1 - \beta + c^2\beta^2 & -c\beta \\ -c\beta(1 - \beta) & 1 - \beta
   \end{pmatrix},\quad \det F = a^4 (1 - \beta)^2,\quad
   \mathrm{tr} F = a^2 (2 (1 - \beta) + c^2\beta^2). $$

Its eigenvalues are $\lambda_\pm = a^2 (1 - \beta) e^{\pm\eta}$ with
$\sinh(\eta/2) = c\beta/(2\sqrt{1 - \beta})$: interference slows forgetting of the error by e^η a
cycle. β = 1 is Kaczmarz's method, $\lambda_+ = c^2$, $\lambda_- = 0$. By Cayley and Hamilton
$F^j = s_j F - \lambda_+ \lambda_- s_{j-1} I$, $s_j = \sum_{i<j} \lambda_+^i \lambda_-^{j-1-i}$.
The exact filter does not mind the order: it is at the ridge solution after every cycle, and what is
left of the error falls as 1/n rather than as $\lambda_+^n$.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .two_keys import TwoKeys, exact_two_keys


class Alternated(NamedTuple):
    """Of two values written in turn, where the first one's key is read.

    Args:
        retention: weight of the first, summed over its writes.
        intrusion: weight of the other.
        noise: sum of the squared weights of all writes: what noise in the values is multiplied by.
    """

    retention: float
    intrusion: float
    noise: float


def alternated_exact(cycles: int, overlap: float, noise: float) -> Alternated:
    r"""The exact filter's. Exact.

    Retention and intrusion are those of `exact_two_keys` with m = n, and as all writes of a value
    weigh the same the noise is $(w_1^2 + w_2^2)/n$. For large n the retention lacks
    $\rho/(n (1 - c^2))$ of 1, the intrusion is $c \rho/(n (1 - c^2))$ and the noise 1/n.
    """
    weights = exact_two_keys(TwoKeys(cycles, cycles, overlap), noise)
    squares = weights.target**2 + weights.other**2
    return Alternated(weights.target, weights.other, squares / cycles)


def alternated_reset(cycles: int, overlap: float, gain: float, decay: float = 1.0) -> Alternated:
    r"""A delta rule's, of gain β. Exact.

    The weights of the writes j cycles before the last are $(F^j b_1)_1$, $(F^j b_2)_1$ with
    $b_1 = a \beta (1 - c^2\beta, c (1 - \beta))$ and $b_2 = \beta (c, 1)$. Without decay they sum
    to $1 - (F^n)_{11}$ and $-(F^n)_{12}$: as n grows, to 1 and 0, while the noise does not vanish.

    Args:
        cycles: n.
        overlap: c.
        gain: β; `reset_gains` are 1/(1 + ρ).
        decay: a, at every write.
    """
    high, low = alternation_rates(overlap, gain, decay)
    kept = 1 - gain
    cycle = decay**2 * np.array(
        [[kept + (overlap * gain) ** 2, -overlap * gain], [-overlap * gain * kept, kept]]
    )
    first = decay * gain * np.array([1 - overlap**2 * gain, overlap * kept])
    other = gain * np.array([overlap, 1.0])
    ages = np.arange(cycles)
    sums = _geometric(high, low, ages)
    before = np.concatenate([[0.0], sums])[:-1]
    fades = sums[:, None] * cycle[0] - (high * low * before)[:, None] * np.array([1.0, 0.0])
    fades[:1] = np.array([1.0, 0.0])  # the identity, at age 0
    own, others = fades @ first, fades @ other
    return Alternated(float(own.sum()), float(others.sum()), float(own @ own + others @ others))


def alternation_rates(overlap: float, gain: float, decay: float = 1.0) -> tuple[float, float]:
    r"""Eigenvalues $\lambda_\pm$ of a cycle: what is left of an error after it. Exact."""
    half = (1 - gain) + (overlap * gain) ** 2 / 2
    root = math.sqrt(max(half**2 - (1 - gain) ** 2, 0.0))
    return decay**2 * (half + root), decay**2 * max(half - root, 0.0)


def alternated_superposed(cycles: int, overlap: float, decay: float = 1.0) -> Alternated:
    """Where values are added and all decay by a: Σ a^(2j + 1), c Σ a^(2j). Exact."""
    last = decay ** (2 * np.arange(cycles))
    squares = np.sum(last**2)
    noise = (decay**2 + overlap**2) * squares
    return Alternated(float(decay * last.sum()), float(overlap * last.sum()), float(noise))


def _geometric(
    high: float, low: float, powers: Float[np.ndarray, " cycle"] | np.ndarray
) -> np.ndarray:
    """s_j, also where both rates are one."""
    return np.array([np.sum(high ** np.arange(j) * low ** np.arange(j)[::-1]) for j in powers])
