r"""How long a value lasts: half-lives in writes, and how many others it outlasts."""

import math

from design_models import ModelError

from .crowd import mean_retention
from .one_key import settling_rate


def half_life(decay: float) -> float:
    r"""Writes after which half of a value is left whose key no other touches, ln 2/(−ln a).

    The same for the exact filter, delta rules and additive memories, whatever the drift: what is
    neither written nor collided with only decays. Algebra.
    """
    return _half(-math.log(decay))


def overwritten_half_life(settling: float) -> float:
    r"""Writes of its own key after which half of a value's weight is left, ln 2/θ.

    Args:
        settling: θ; of the exact filter on its plateau `settling_rate`, of a delta rule
            −ln(a(1 − β)).
    """
    return _half(settling)


def reset_crowded_half_life(gain: float, width: int, decay: float = 1.0) -> float:
    r"""Writes of others with random keys that halve a delta rule's mean weight. Exact mean.

    $\ln 2/(-\ln a - \ln(1 - \beta/K))$, about 0.69 K/β without decay.
    """
    return _half(-math.log(decay) - math.log1p(-gain / width))


def crowded_half_life(decay: float, drift: float, noise: float, width: int) -> float:
    r"""Writes of others with random keys that halve a value's weight in the exact filter, ln 2/θ.

    Long after the first write and before the last, the smoothed variance p of `stream` settles; the
    weight of an old value falls as $P_{st} \propto e^{-\theta |s - t|}$ with

    $$ \cosh\theta = \frac{1 + a^2 + q/(K (\rho + p))}{2 a},\qquad p = \frac{q}{2 a \sinh\theta}. $$

    This is `settling_rate` at the noise $K (\rho + p)$. For wide keys, error O(1/K).

    Raises:
        ModelError: without drift nothing settles: the weight falls by a power law (`capacity`).
    """
    if drift <= 0:
        raise ModelError(
            f"`drift` is {drift}; without drift there is no half-life, see `capacity`."
        )

    def rate(variance: float) -> float:
        return settling_rate(decay, drift, width * (noise + variance))

    variance, last = drift / (2 * decay * math.sinh(rate(0.0))), 0.0
    while variance - last > 1e-12 * variance:  # rises to the fixed point, at least geometrically
        variance, last = drift / (2 * decay * math.sinh(rate(variance))), variance
    return _half(rate(variance))


def capacity(share: float, width: int, noise: float) -> float:
    r"""Others with random keys that leave a value a share f of its first weight, exact filter.

    Marchenko-Pastur's equation solved for the load, with φ = f/(1 + ρ) and m = ρφ/(1 − φ),

    $$ N = K (1 - m)/\varphi; \qquad f = \tfrac12:\; N = 2K\,\frac{(1 + \rho)^2}{1 + 2\rho}, $$

    and moved by the correction of `crowd` over its slope in N, $-\varphi\varphi'/(K (1 +
    c\varphi'))$, so that the error is O(1/K²). A delta rule's half is at 0.69 K/β.

    Args:
        share: f.
        width: K.
        noise: ρ.
    """
    weight = share / (1 + noise)
    mean = noise * weight / (1 - weight)
    others = width * (1 - mean) / weight
    first = noise / (noise + mean) ** 2
    slope = -weight * first / (width + others * first)
    return others - (mean_retention(others, width, noise) - weight) / slope


def _half(rate: float) -> float:
    return math.log(2) / rate if rate > 0 else math.inf
