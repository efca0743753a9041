"""How far the closed forms of retrieval are from simulation, over a grid of regimes.

    python -m benchmarks.retrieval

For each form: the median and the worst relative error, the regime of the worst, and what share of
that error simulation itself may have (one standard error). Both fall with more draws until the
form's own error is what is left.
"""

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recall.records import keeper
from tests.retrieval_grid import REGIMES, Comparison, compare

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Config:
    """Draws of keys in each regime, and the seed of all of them."""

    draws: int = 10_000
    seed: int = 0


def summary(found: list[Comparison]) -> dict[str, Any]:
    """Of all regimes of a form, quantity by quantity."""
    named: dict[str, list[Comparison]] = defaultdict(list)
    for one in found:
        named[one.quantity].append(one)
    return {quantity: _of_quantity(own) for quantity, own in named.items()}


def _of_quantity(own: list[Comparison]) -> dict[str, Any]:
    worst = max(own, key=lambda one: one.apart)
    # The form's own error: what simulation cannot explain by three standard errors.
    surest = max(own, key=lambda one: max(0.0, one.apart - 3 * _relative(one)))
    return {
        "regimes": len(own),
        "held": sum(one.holds for one in own),
        "median_error": _short(statistics.median(one.apart for one in own)),
        "worst_error": _short(worst.apart),
        "standard_error_there": _short(_relative(worst)),
        "worst_regime": worst.regime,
        "most_beyond_three_standard_errors": _short(max(0.0, surest.apart - 3 * _relative(surest))),
        "regime_of_that": surest.regime,
    }


def _relative(one: Comparison) -> float:
    return one.standard_error / abs(one.measured)


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def run(config: Config) -> dict[str, Any]:
    """Compare in every regime."""
    by_form: dict[str, list[Comparison]] = defaultdict(list)
    for found in compare(config.draws, config.seed):
        by_form[found[0].form] += found
    everything = [one for found in by_form.values() for one in found]
    drawn = [one for one in everything if one.standard_error]
    for form, found in by_form.items():
        worst = max(found, key=lambda one: one.apart)
        chance = f"standard error {_relative(worst):.1g}"
        print(f"{form}: worst {worst.apart:.2g}, {chance} ({worst.quantity}, {worst.regime})")
    return {
        "regimes": REGIMES,
        "comparisons": len(everything),
        "held": sum(one.holds for one in everything),
        "median_error_of_means": _short(statistics.median(one.apart for one in drawn)),
        "forms": {form: summary(found) for form, found in by_form.items()},
    }


def main() -> None:
    """Write results/retrieval.json."""
    config = Config()
    keep = keeper(
        RESULTS / "retrieval.json",
        asdict(config),
        command="python -m benchmarks.retrieval",
        seed=config.seed,
    )
    keep(run(config))


if __name__ == "__main__":
    main()
