"""Table and plot of what a layer will keep: predicted, and simulated with 95 % bands."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .collisions.curves import Curve

BAND = 1.96
"""Standard errors of a mean on either side that hold it with probability 0.95."""


def forecast_table(curves: Sequence[Curve]) -> Table:
    """A row for each point of the axis; simulated ± its band, predicted in brackets."""
    table = Table(caption="simulated ± 95 % (predicted)", caption_justify="left")
    table.add_column(curves[0].axis, justify="right")
    for curve in curves:
        table.add_column(curve.quantity, justify="right")
    for place, at in enumerate(curves[0].at):
        table.add_row(f"{at:g}", *(_cell(curve, place) for curve in curves))
    return table


def _cell(curve: Curve, place: int) -> Text:
    measured, error = curve.measured[place], curve.standard_error[place]
    spread = f" ± {BAND * error:.2g}" if error > 1e-12 else ""
    if curve.predicted is None:
        return Text(f"{measured:.4g}{spread} (–)")
    style = "bold red" if curve.departs else ""
    return Text(f"{measured:.4g}{spread} ({curve.predicted[place]:.4g})", style)


def plot_forecast(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """A panel for each quantity: the prediction as a line, simulation as dots in its band."""
    from matplotlib.figure import Figure

    across = 2
    rows = -(-len(curves) // across)
    figure = Figure(figsize=(8.0, 1.0 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False).ravel()
    for axis, curve in zip(panels, curves, strict=False):
        _panel(axis, curve)
    for axis in panels[len(curves) :]:
        axis.set_axis_off()
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle(textwrap.fill(title, 80), fontsize="medium")
    figure.savefig(path, dpi=90)


def _panel(axis: Any, curve: Curve) -> None:
    at, measured = np.asarray(curve.at), np.asarray(curve.measured)
    band = BAND * np.asarray(curve.standard_error)
    axis.fill_between(at, measured - band, measured + band, color="C0", alpha=0.25, linewidth=0)
    axis.plot(at, measured, "o", color="C0", markersize=4, label="simulated, 95 % band of the mean")
    if curve.predicted is not None:
        axis.plot(at, curve.predicted, color="black", linewidth=1, label="closed form")
    else:
        axis.annotate("no closed form", (0.5, 0.9), xycoords="axes fraction", ha="center")
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(at, [f"{number:g}" for number in at])
    axis.minorticks_off()
    axis.set_ylim(bottom=min(0.0, float(np.min(measured - band)) * 1.05))
    axis.set(xlabel=curve.axis, ylabel=curve.quantity)
    axis.grid(alpha=0.2)
