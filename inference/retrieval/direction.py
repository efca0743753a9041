r"""Means of h/(σ + h) and 1/(σ + h), h = kᵀBk a quadratic form of a uniformly random direction k.

Over k alone, B held fixed, the mean is exact. With k = g/|g| of a Gaussian g,
$(k^\top (\sigma + B) k)^{-1} = |g|^2 \int_0^\infty e^{-t g^\top (\sigma + B) g} dt$, and |g| is
independent of k, so with $y = 2t/(1 + 2t\sigma)$, $F(y) = \det(I + yB)^{-1/2}$ and by parts

$$ E\,\frac{1}{\sigma + h} = (\tfrac{K}{2} - 1) \int_0^{1/\sigma} (1 - \sigma y)^{K/2 - 2} F\,dy,
   \qquad E\,\frac{h}{\sigma + h} = -\int_0^{1/\sigma} (1 - \sigma y)^{K/2 - 1} F'\,dy. $$

Its expansion in 1/K starts with $p/(\sigma + p) - \sigma\,\mathrm{var}\,h/(\sigma + p)^3$, p = E h,
and is of little use where h varies by a third, as among 8 keys of 16 entries: there h is nearly
Beta((K − N)/2, N/2), and this integral is exact as the noise vanishes.

**B is random too**, but log det(I + yB) is a linear statistic of its spectrum: its cumulants after
the second vanish as K grows, so that $E F = \exp(-\tfrac12 E \Lambda + \tfrac18 \mathrm{var}
\Lambda)$, $\Lambda = \log\det(I + yB)$. The integral only asks for y of order 1/K, where var Λ is
of order 1/K² and what is left out O(1/K³); the error is that of the mean of Λ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_ENOUGH, _TOO_MUCH, _MOST_HALVINGS, _DIGITS = 36.0, 72.0, 40, 8

LogKept = Callable[[Any], Any]


def reach(log_kept: LogKept, width: int | float, noise: Any, largest: float, mean: float) -> Any:
    r"""Where the integral may end, in $u = \log(1 + y b)$: the rest is below e^(−36).

    Args:
        log_kept: u -> log F, real or complex.
        width: K.
        noise: σ.
        largest: b, no eigenvalue of B exceeds it.
        mean: E h, with which the search begins: log F is about −(K/2) log(1 + y E h), or less.
    """
    limit = np.log1p(largest / noise)
    low, high = 0.0, float(np.real(limit))
    place = min(float(np.log1p(largest / mean * np.expm1(2 * _ENOUGH / width))), high / 2)
    for _ in range(_MOST_HALVINGS):
        spent = -float(np.real(log_kept(place)))
        spent -= (width / 2 - 1) * np.log1p(-np.real(noise) * np.expm1(place) / largest)
        if spent > _TOO_MUCH:
            high = place
        elif spent < _ENOUGH:
            low = place
        else:
            return place
        if high - low < 0.05 * high:
            break
        place = (low + high) / 2
    return limit if high == np.real(limit) else high


def mean_share(
    kept: Callable[[Any], tuple[Any, Any]],
    width: int | float,
    noise: Any,
    largest: float,
    end: Any,
) -> Any:
    r"""The mean of h/(σ + h), to rounding for the F given.

    Args:
        kept: u -> log F and its slope in u.
        width: K.
        noise: σ; it may be complex.
        largest: b of `reach`.
        end: that of `reach`.
    """
    place = end * (_NODES + 1) / 2
    logarithm, slope = kept(place)
    left = 1 - noise * np.expm1(place) / largest
    return -np.sum(_WEIGHTS * left ** (width / 2 - 1) * np.exp(logarithm) * slope) * end / 2


def mean_inverse(
    log_kept: LogKept, width: int | float, noise: Any, largest: float, end: Any
) -> Any:
    r"""The mean of 1/(σ + h), to rounding for the F given, for K >= 4; arguments as there."""
    place = end * (_NODES + 1) / 2
    left = 1 - noise * np.expm1(place) / largest
    whole = np.exp(log_kept(place) + place) * left ** (width / 2 - 2)
    return (width / 2 - 1) * np.sum(_WEIGHTS * whole) * end / 2 / largest


class Fitted(NamedTuple):
    """A polynomial on [0, end], by its Chebyshev coefficients, real or complex."""

    coefficients: Any
    end: Any

    def __call__(self, place: Any) -> Any:
        return chebyshev.chebval(2 * place / self.end - 1, self.coefficients)

    def slope(self) -> "Fitted":
        return Fitted(chebyshev.chebder(self.coefficients) * 2 / self.end, self.end)

    def integral(self) -> "Fitted":
        """From 0."""
        return Fitted(chebyshev.chebint(self.coefficients, lbnd=-1) * self.end / 2, self.end)


def fitted(function: Callable[[Any], Any], end: Any) -> Fitted:
    r"""The polynomial through a function of u, analytic where |Im u| < π, at Chebyshev nodes.

    As log det(I + yB) is in $u = \log(1 + y b)$. An error falls as e^(−n arsinh(2π/end)).
    """
    count = 2 + round(_DIGITS * np.log(10) / np.arcsinh(2 * np.pi / np.real(end)))
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    values = np.array([function(end * (node + 1) / 2) for node in nodes])
    return Fitted(np.linalg.solve(chebyshev.chebvander(nodes, count - 1), values), end)
