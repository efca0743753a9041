"""Tables of distillations."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def distillation_table(metrics: Mapping[str, Any]) -> Table:
    """Held-out loss and retrieval of teacher and student, and what training took."""
    title = (
        f"{metrics['tokens']:,} tokens, {metrics['device_seconds']:,.0f} device seconds, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("held out", "perplexity", "loss ± s.e.", "needles found"):
        table.add_column(heading, justify="left" if heading == "held out" else "right")
    names = {"teacher": "teacher", "before": "student before", "after": "student after"}
    if not metrics["restored_layers"]:
        names = {"teacher": "teacher", "after": "control after"}
    for name, words in names.items():
        found = metrics[name]
        table.add_row(
            words,
            f"{found['perplexity']:.3f}",
            f"{found['loss']:.4f} ± {found['loss_error']:.4f}",
            f"{found['retrieved']:.1%}",
        )
    return table


def inside_table(inside: Mapping[str, Mapping[str, Any]]) -> Table:
    """Of each restored head: its dials, and its gain and variance along what it writes."""
    table = Table(title="inside restored layers", title_justify="left")
    columns = {
        "restoration": "λ",
        "reset": "σ²",
        "decay": "decay",
        "drift": "drift",
        "strength": "β",
        "gain_early": "gain, first 64",
        "gain_late": "last 64",
        "variance_early": "variance, first 64",
        "variance_late": "last 64",
    }
    for heading in ("layer", "head", *columns.values()):
        table.add_column(heading, justify="right")
    for layer, found in inside.items():
        for head in range(len(found["restoration"])):
            table.add_row(layer, str(head), *(f"{found[name][head]:.4g}" for name in columns))
    return table
