"""Tables of trained runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .plans import Plan
from .sweep import Line


def training_table(plan: Plan, metrics: Mapping[str, Any]) -> Table:
    """Test accuracy of every run on every kind of rows."""
    title = f"{plan.task}: {plan.layer}, width {plan.d_model}, {metrics['parameters']:,} parameters"
    table = Table(title=title, title_justify="left")
    for heading in ("rate", "seed", "final loss", *plan.tests):
        table.add_column(heading, justify="right")
    for place, (rate, seed) in enumerate(plan.runs):
        accuracies = [found[place]["accuracy"] for found in metrics["test"].values()]
        cells = (f"{accuracy:.3f}" for accuracy in accuracies)
        table.add_row(f"{rate:g}", str(seed), f"{metrics['final_loss'][place]:.3f}", *cells)
    return table


def beyond_table(plan: Plan, scores: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Accuracy, calibration and abstention of every run, kind of rows by kind of rows."""
    table = Table(title=f"{plan.task}: {plan.layer}", title_justify="left")
    headings = {
        "accuracy": "accuracy",
        "calibration_error": "calibration error",
        "coverage": "coverage of 0.9",
        "entropy_auroc": "AUROC of entropy",
        "variance_auroc": "AUROC of variance",
    }
    _add_columns(table, headings)
    for rows, found in scores.items():
        for score, (rate, seed) in zip(found, plan.runs, strict=True):
            cells = (
                "–" if score[name] != score[name] else f"{score[name]:.3f}" for name in headings
            )
            table.add_row(rows, f"{rate:g}", str(seed), *cells)
    return table


def honesty_table(plan: Plan, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Calibration of every run's memory, kind of rows by kind of rows, where it predicts values."""
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
        for score, (rate, seed) in zip(found, plan.runs, strict=True):
            if score["memory"] is not None:
                cells = (f"{score['memory'][name]:.3g}" for name in headings)
                table.add_row(rows, f"{rate:g}", str(seed), *cells)
    return table


def sweep_table(lines: Sequence[Line]) -> Table:
    """Mean test accuracy over seeds, and its spread, at each layer's best rate."""
    table = Table(title="test accuracy, mean ± deviation over seeds", title_justify="left")
    for heading in ("layer", "width", "parameters", "best rate", *lines[0].accuracy, "tokens/s"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for line in lines:
        cells = (f"{np.mean(part):.3f} ± {np.std(part):.3f}" for part in line.accuracy.values())
        table.add_row(
            line.layer,
            str(line.d_model),
            f"{line.parameters:,}",
            f"{line.rate:g}",
            *cells,
            f"{line.tokens_per_second:,.0f}",
        )
    return table


def _add_columns(table: Table, headings: Mapping[str, str]) -> None:
    """Which run and rows a line is about, then its numbers."""
    for heading in ("rows", "rate", "seed"):
        table.add_column(heading)
    for heading in headings.values():
        table.add_column(heading, justify="right")
