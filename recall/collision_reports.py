"""Tables of the collision studies."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .collisions.catalogue import STUDIES, Column
from .collisions.curves import Curve


def study_table(study: str, curves: Sequence[Curve]) -> Table:
    """What was measured at the end of each axis, and what was predicted in brackets."""
    own = [curve for curve in curves if curve.study == study]
    columns = [(column, _curves(own, column)) for column in STUDIES[study].columns]
    table = Table(title=f"{study}: {STUDIES[study].title}; measured (predicted)")
    table.title_justify = "left"
    table.add_column("layers")
    for column, found in columns:
        first = found[0]
        order = f"{column.order}\n" if column.order else ""
        heading = f"{order}{column.quantity}\n{column.axis} = {first.at[-1]:g}"
        table.add_column(heading, justify="right")
    for layers in dict.fromkeys(curve.layers for curve in own):
        cells = (_cell(curve) for _, found in columns for curve in found if curve.layers == layers)
        table.add_row(", ".join(layers), *cells)
    return table


def departures(curves: Sequence[Curve]) -> Text:
    """How many measurements were predicted, and which depart from their prediction."""
    predicted = [curve for curve in curves if curve.predicted is not None]
    wrong = [curve for curve in predicted if curve.departs]
    if not wrong:
        return Text(
            f"{len(predicted)} of {len(curves)} curves have a closed form, and all agree with it",
            "green",
        )
    lines = (
        " ".join(filter(None, (curve.study, curve.order, curve.quantity, curve.layers[0])))
        for curve in wrong
    )
    return Text("depart from their closed form:\n  " + "\n  ".join(lines), "bold red")


def _curves(curves: Sequence[Curve], column: Column) -> list[Curve]:
    return [
        curve
        for curve in curves
        if (curve.axis, curve.order, curve.quantity) == (column.axis, column.order, column.quantity)
    ]


def _cell(curve: Curve) -> Text:
    measured = f"{curve.measured[-1]:.3g}"
    if curve.predicted is None:
        return Text(f"{measured} (–)")
    style = "bold red" if curve.departs else ""
    return Text(f"{measured} ({curve.predicted[-1]:.3g})", style)
