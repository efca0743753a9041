"""A task and its rows on the command line."""

import argparse
from dataclasses import fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tasks.catalogue import Rows, Task

TASK_NAMES = (
    "mqar",
    "mqar_overwrite",
    "associative_recall",
    "collision",
    "in_context_recall",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copy",
)
"""As in `recall.tasks.catalogue`, which takes JAX to import."""

_OPTIONS = {
    "vocabulary": ("vocab", int, "number of tokens"),
    "length": ("length", int, "positions of a row"),
    "pairs": ("pairs", int, "keys of a row"),
    "overwrites": ("overwrites", int, "pairs that give a key of the row another value"),
    "power": ("power", float, "gaps before queries have probability ~ gap^(power - 1)"),
    "noise_vocabulary": ("noise-vocab", int, "tokens that are noise"),
    "noise": ("noise", float, "probability that a pair is noise"),
    "key_motif": ("key-motif", int, "largest number of tokens in a key"),
    "value_motif": ("value-motif", int, "largest number of tokens in a value"),
    "copied": ("copied", int, "tokens to copy"),
    "codes": ("codes", int, "keys, and values, that there are"),
    "passes": ("passes", int, "times each pair is written"),
    "revisions": ("revisions", int, "keys written once more with another value"),
    "overlap": ("overlap", float, "cosine between any two keys"),
}
"""Every field of a task's rows: its option, its type, and what it is."""


def add_row_options(command: argparse.ArgumentParser) -> None:
    """Add an option for every field that the rows of some task have."""
    group = command.add_argument_group("rows", "each task takes its own; the rest is an error")
    for name, (option, kind, what) in _OPTIONS.items():
        group.add_argument(f"--{option}", dest=f"row_{name}", type=kind, metavar="N", help=what)


def chosen_rows(task: "Task", request: argparse.Namespace) -> "Rows":
    """The task's rows with what the request changes.

    Raises:
        ModelError: the task has no such option, or its parts do not fit.
    """
    from design_models import ModelError

    given = {
        name: value for name in _OPTIONS if (value := getattr(request, f"row_{name}")) is not None
    }
    own = [field.name for field in fields(task.rows)]
    foreign = [name for name in given if name not in own]
    if foreign:
        takes = ", ".join(f"--{_OPTIONS[name][0]}" for name in own)
        raise ModelError(f"{task.name} has no `--{_OPTIONS[foreign[0]][0]}`; it takes {takes}.")
    return replace(task.rows, **given)
