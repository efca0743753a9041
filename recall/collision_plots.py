"""Plots of the collision studies: dots are measured, solid lines predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .collisions.catalogue import STUDIES, Column
from .collisions.curves import Curve

_SMALLEST = {"intrusion": 1e-2, "squared error": 1e-3, "stated variance": 1e-3}
_SMALLEST |= {"squared error, not told": 1e-3}
"""Quantities that are drawn on a logarithmic axis, and where it turns linear, to reach 0."""

_ACROSS = 2


def plot_study(path: Path, study: str, curves: Sequence[Curve]) -> None:
    """A panel for each column of the study's table, along its axis, and for its further panels."""
    from matplotlib.figure import Figure

    own = [curve for curve in curves if curve.study == study and len(curve.at) > 1]
    asked = (*STUDIES[study].columns, *STUDIES[study].panels)
    panels = [column for column in asked if any(_is_of(curve, column) for curve in own)]
    rows = -(-len(panels) // _ACROSS)
    figure = Figure(figsize=(9.0, 1.6 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, _ACROSS, squeeze=False).ravel()
    groups = list(dict.fromkeys(curve.layers for curve in own))
    for axis, column in zip(axes, panels, strict=False):
        shown = [curve for curve in own if _is_of(curve, column)]
        for curve in shown:
            _draw(axis, curve, groups.index(curve.layers))
        _scale(axis, column, shown[0].at)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{STUDIES[study].title}\ndots: measured; lines: closed form")
    figure.savefig(path, dpi=90)


def _is_of(curve: Curve, column: Column) -> bool:
    wanted = (column.axis, column.order, column.quantity)
    return (curve.axis, curve.order, curve.quantity) == wanted


def _draw(axis: Any, curve: Curve, place: int) -> None:
    """Measured as dots, joined by faint dashes where nothing is predicted."""
    is_exact = "bayesian_layer" in curve.layers
    color, front = ("black", 3) if is_exact else (f"C{place}", 2)
    axis.plot(
        curve.at,
        curve.measured,
        "o" if curve.predicted is not None else "o:",
        color=color,
        markersize=4,
        linewidth=1,
        zorder=front,
        label=", ".join(curve.layers),
    )
    if curve.predicted is not None:
        axis.plot(curve.at, curve.predicted, color=color, linewidth=1, zorder=front)


def _scale(axis: Any, column: Column, at: Sequence[float]) -> None:
    if column.axis != "cosine":
        axis.set_xscale("log", base=2)
    axis.set_xticks(np.asarray(at), [f"{place:g}" for place in at])
    axis.minorticks_off()
    if column.quantity in _SMALLEST:
        axis.set_yscale("symlog", linthresh=_SMALLEST[column.quantity])
        axis.set_ylim(bottom=0)
    axis.set(xlabel=column.axis, ylabel=column.quantity, title=column.order)
    axis.grid(alpha=0.2)
