r"""RULER's metrics, and how far a mean of them may be from what it estimates.

A sample's score is a share of answers found, in [0, 1]. The interval is Wilson's (1927),

$$ \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}, $$

for n samples of mean p. Where a sample has several answers its score varies less than a coin of
the same mean does, and the interval is wider than it need be.
"""

import math
import re
from collections.abc import Sequence
from statistics import NormalDist

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def found_all(said: str, answers: Sequence[str]) -> float:
    """Share of the answers that are in what is said, letter case apart: `string_match_all`."""
    text = _cleaned(said)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def found_any(said: str, answers: Sequence[str]) -> float:
    """1 where one of the answers is in what is said, letter case apart: `string_match_part`."""
    text = _cleaned(said)
    return float(any(answer.lower() in text for answer in answers))


def _cleaned(said: str) -> str:
    return _UNPRINTABLE.sub("\n", said.strip()).strip().lower()


def interval(mean: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a mean of `count` scores in [0, 1]."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = mean + z**2 / (2 * count)
    half = z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
