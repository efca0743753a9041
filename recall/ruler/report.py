"""Cells as a table, and as lines over length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from .cells import Cell


def cells_table(cells: Sequence[Cell], title: str) -> Table:
    """A row a task, a column a length: percent, with Wilson's interval."""
    lengths = sorted({cell.length for cell in cells})
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    by_place = {(cell.task, cell.length): cell for cell in cells}
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "percent found, and its 95 % interval"
    table.add_column("task")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for task in tasks:
        found = [by_place.get((task, length)) for length in lengths]
        table.add_row(task, *("" if cell is None else _words(cell) for cell in found))
    if len(tasks) > 1:
        table.add_section()
        table.add_row("mean of tasks", *(_mean(cells, length) for length in lengths))
    return table


def _words(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.score:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(cells: Sequence[Cell], length: int) -> str:
    return f"{100 * np.mean([cell.score for cell in cells if cell.length == length]):.1f}"


def plot_cells(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Percent found against length, a line a task, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axis = figure.subplots()
    lengths = sorted({cell.length for cell in cells})
    for number, task in enumerate(dict.fromkeys(cell.task for cell in cells)):
        own = sorted((cell for cell in cells if cell.task == task), key=lambda cell: cell.length)
        score = np.array([cell.score for cell in own])
        low, high = np.array([cell.interval for cell in own]).T
        axis.errorbar(
            [cell.length for cell in own],
            100 * score,
            100 * np.clip([score - low, high - score], 0, None),
            color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            marker="o",
            markersize=4,
            capsize=2,
            label=task,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set(xlabel="length (tokens, answer included)", ylabel="found (%)", ylim=(-3, 103))
    axis.set_title(title)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
