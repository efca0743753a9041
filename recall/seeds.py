"""Runs that differ in rate and seed alone: which rate is best, and what its seeds say together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .plans import Plan


def best_rate(plan: Plan, validation: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The rate of greatest accuracy on validation rows, mean over seeds and kinds of rows.

    Args:
        plan: of the runs.
        validation: scores of every run, by name of the rows.
    """

    def accuracy(rate: float) -> float:
        return float(np.mean([of_rate(plan, "accuracy", found, rate) for found in kinds]))

    kinds = list(validation.values())
    return max(plan.rates, key=accuracy)


def of_rate(plan: Plan, name: str, found: Sequence[Mapping[str, Any]], rate: float) -> list[float]:
    """A score of the runs at one rate, seed by seed."""
    return [
        float(score[name]) for score, run in zip(found, plan.runs, strict=True) if run[0] == rate
    ]


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and the half width of its 95 % interval (Student's); NaN of one seed.

    Seeds of which a score is not defined (NaN) are left out.
    """
    defined = [value for value in values if math.isfinite(value)]
    if len(defined) < 2:
        return (defined or [math.nan])[0], math.nan
    half = stats.t.ppf(0.975, len(defined) - 1) * stats.sem(defined)
    return float(np.mean(defined)), float(half)


def shown(values: Sequence[float], digits: str = ".3f") -> str:
    """`over_seeds` in a number format, or a dash where nothing is defined."""
    mean, half = over_seeds(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:{digits}}" if math.isnan(half) else f"{mean:{digits}} ± {half:{digits}}"
