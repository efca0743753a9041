"""Plots of the collision studies: dots are measured, solid lines predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .collisions.catalogue import STUDIES, Column
from .collisions.curves import Curve

_COLORS = (*(f"C{place}" for place in range(10)), "gold", "navy", "olive", "teal", "salmon")

_HIGHEST = 1.25
"""Of weights that are drawn: independent entries read a value several times over."""

_LOWEST = 1e-4
"""Of errors and variances that are drawn."""

_ACROSS = 2


def plot_study(path: Path, study: str, curves: Sequence[Curve]) -> None:
    """A panel for each column of the study's table, along its axis, and for its further panels."""
    from matplotlib.figure import Figure

    own = [curve for curve in curves if curve.study == study and len(curve.at) > 1]
    asked = (*STUDIES[study].columns, *STUDIES[study].panels)
    panels = [column for column in asked if any(_is_of(curve, column) for curve in own)]
    rows = -(-len(panels) // _ACROSS)
    figure = Figure(figsize=(8.0, 1.5 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, _ACROSS, squeeze=False).ravel()
    groups = list(dict.fromkeys(curve.layers for curve in own))
    for axis, column in zip(axes, panels, strict=False):
        shown = [curve for curve in own if _is_of(curve, column)]
        for curve in shown:
            _draw(axis, curve, groups.index(curve.layers))
        _scale(axis, column, shown)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.suptitle(f"{STUDIES[study].title}\ndots: measured; lines: closed form")
    figure.savefig(path, dpi=72, pil_kwargs={"compress_level": 9})


def _is_of(curve: Curve, column: Column) -> bool:
    wanted = (column.axis, column.order, column.quantity)
    return (curve.axis, curve.order, curve.quantity) == wanted


def _draw(axis: Any, curve: Curve, place: int) -> None:
    """Measured as dots, joined by faint dashes where nothing is predicted."""
    is_exact = "bayesian_layer" in curve.layers
    color, front = ("black", 3) if is_exact else (_COLORS[place], 2)
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


def _scale(axis: Any, column: Column, curves: Sequence[Curve]) -> None:
    at, label = curves[0].at, column.quantity
    if column.axis != "cosine":
        axis.set_xscale("log", base=2)
    axis.set_xticks(np.asarray(at), [f"{place:g}" for place in at])
    axis.minorticks_off()
    if column.quantity == "intrusion":
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(bottom=-5e-3)
    elif column.quantity in ("retention", "gain"):
        is_cut = max(max(curve.measured) for curve in curves) > _HIGHEST
        label += ", cut" if is_cut else ""
        axis.set_ylim(-0.05, _HIGHEST)
    elif column.quantity.startswith(("squared error", "stated variance")):
        is_cut = min(min(curve.measured) for curve in curves) < _LOWEST
        label += ", cut" if is_cut else ""
        axis.set_yscale("log")
        axis.set_ylim(bottom=_LOWEST if is_cut else None)
    axis.set(xlabel=column.axis, ylabel=label, title=column.order)
    axis.grid(alpha=0.2)
