"""Plots of a training run, written beside its record."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plans import Plan

_WINDOW = 25


def learning_curve(
    path: Path, plan: Plan, history: Mapping[str, Sequence[Sequence[float]]]
) -> None:
    """Loss and accuracy against steps, a line a run, as means over 25 steps."""
    figure, axes = _figure(2, 9.0)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        numbers = np.asarray(history[name])
        window = min(_WINDOW, len(numbers))
        steps = np.arange(window, len(numbers) + 1)
        for column, (rate, seed) in zip(numbers.T, plan.runs, strict=True):
            smooth = np.convolve(column, np.full(window, 1 / window), "valid")
            axis.plot(steps, smooth, label=f"rate {rate:g}, seed {seed}")
        axis.set(xlabel="step", ylabel=f"training {name}")
    axes[1].set_ylim(-0.02, 1.02)
    axes[0].legend(frameon=False)
    figure.suptitle(f"{plan.task}: {plan.layer}, width {plan.d_model}")
    _save(figure, path)


def accuracy_by_load(
    path: Path, plan: Plan, scores: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Accuracy on every kind of rows, a dot a run."""
    figure, (axis,) = _figure(1, 1.5 + 1.3 * len(scores))
    for place, found in enumerate(scores.values()):
        axis.plot([place] * len(found), [score["accuracy"] for score in found], "o", color="C0")
    axis.set_xticks(range(len(scores)), list(scores), rotation=20, ha="right")
    axis.set(ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{plan.task}: {plan.layer}")
    _save(figure, path)


def _figure(columns: int, width: float) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
