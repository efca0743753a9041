"""Tables of trained runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .plans import Plan
from .seeds import of_rate, shown
from .sweep import Line

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of every run, by name of the rows."""


def training_table(plan: Plan, metrics: Mapping[str, Any]) -> Table:
    """Test accuracy of every run on every kind of rows, and their mean, which Zoology reports."""
    title = f"{plan.task}: {plan.layer}, width {plan.d_model}, {metrics['parameters']:,} parameters"
    table = Table(title=title, title_justify="left")
    for heading in ("rate", "seed", "final loss", *plan.tests, "mean"):
        table.add_column(heading, justify="right")
    for place, (rate, seed) in enumerate(plan.runs):
        accuracies = [found[place]["accuracy"] for found in metrics["test"].values()]
        accuracies.append(sum(accuracies) / len(accuracies))
        cells = (f"{accuracy:.3f}" for accuracy in accuracies)
        table.add_row(f"{rate:g}", str(seed), f"{metrics['final_loss'][place]:.3f}", *cells)
    return table


def beyond_table(plan: Plan, rate: float, scores: Scores) -> Table:
    """Accuracy, calibration and abstention over seeds, kind of rows by kind of rows."""
    table = Table(title=_of_seeds(plan, rate), title_justify="left")
    headings = {
        "accuracy": "accuracy",
        "calibration_error": "calibration error",
        "coverage": "coverage of 0.9",
        "entropy_auroc": "AUROC of entropy",
        "variance_auroc": "AUROC of variance",
    }
    _add_columns(table, headings)
    for rows, found in scores.items():
        table.add_row(rows, *(shown(of_rate(plan, name, found, rate)) for name in headings))
    return table


def honesty_table(plan: Plan, rate: float, scores: Scores) -> Table:
    """Calibration of the memory over seeds, kind of rows by kind, where it predicts values."""
    table = Table(
        title=f"what the memory of {plan.layer} says of the values asked for",
        title_justify="left",
        caption="number by number, in units of each head's values. error / stated: squared error "
        "over stated variance, above 1 where the memory is too sure. PIT gap: 0 for an honest "
        "memory. Log score: in nats, the larger the better; CRPS: the smaller the better.",
        caption_justify="left",
    )
    headings = {
        "coverage": "coverage of 0.9",
        "error_ratio": "error / stated",
        "pit_gap": "PIT gap",
        "sharpness": "stated deviation",
        "log_score": "log score",
        "crps": "CRPS",
    }
    _add_columns(table, headings)
    for rows, found in scores.items():
        if all(score["memory"] is not None for score in found):
            told = [score["memory"] for score in found]
            parts = (of_rate(plan, name, told, rate) for name in headings)
            table.add_row(rows, *(shown(part, ".3g") for part in parts))
    return table


def sweep_table(lines: Sequence[Line]) -> Table:
    """Test accuracy over seeds, at each layer's best rate."""
    table = Table(title="test accuracy, mean ± 95 % interval over seeds", title_justify="left")
    kinds = *lines[0].accuracy, "mean"
    for heading in ("layer", "width", "parameters", "best rate", *kinds, "tokens/s"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for line in lines:
        by_kind = list(line.accuracy.values())
        cells = map(shown, [*by_kind, np.mean(by_kind, axis=0).tolist()])
        table.add_row(
            line.layer,
            str(line.d_model),
            f"{line.parameters:,}",
            f"{line.rate:g}",
            *cells,
            f"{line.tokens_per_second:,.0f}",
        )
    return table


def _of_seeds(plan: Plan, rate: float) -> str:
    many = len(plan.seeds) > 1
    return f"{plan.task}: {plan.layer}, rate {rate:g}" + ", mean ± 95 % interval over seeds" * many


def _add_columns(table: Table, headings: Mapping[str, str]) -> None:
    """Which rows a line is about, then its numbers."""
    table.add_column("rows")
    for heading in headings.values():
        table.add_column(heading, justify="right")
