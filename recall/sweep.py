"""Sweeps: layers × widths, each with all its rates and seeds side by side in one program.

A sweep is a TOML file, here with everything it may hold:

    task = "mqar"
    layers = ["deltanet", "bayesian_layer"]
    widths = [64]                 # default [64]
    rates = [1e-3, 3e-3, 1e-2]    # default: the preset's
    seeds = [0, 1, 2]             # default [0]
    preset = "small"              # or "zoology"; default "small"
    heads = 2                     # default 2
    expansion = 2                 # values so many times as wide as keys; default: as published
    epochs = 32                   # zoology only; 32 as published
    steps = 600                   # small only
    batch = 64                    # small only; default: 64, fewer where rows are long
    [rows]                        # small only; the task's own
    pairs = 8
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from design_models import ModelError

from .plans import (
    PRESETS,
    SMALL_STEPS,
    ZOOLOGY_EPOCHS,
    Plan,
    small_batch,
    small_plan,
    small_rows,
    zoology_plan,
)
from .run import finish
from .run_folder import RunFolder
from .seeds import best_rate, of_rate
from .tasks.catalogue import TASKS

_KINDS: dict[str, type] = {
    "task": str,
    "layers": list,
    "widths": list,
    "rates": list,
    "seeds": list,
    "preset": str,
    "heads": int,
    "expansion": int,
    "epochs": int,
    "steps": int,
    "batch": int,
    "rows": dict,
}


@dataclass(frozen=True)
class Line:
    """What came of a layer at a width: at the rate that is best on validation.

    Args:
        layer: its name.
        d_model: the width.
        parameters: numbers that training changes.
        rate: the best by validation accuracy, mean over seeds and kinds of rows.
        accuracy: test accuracy on each kind of rows, seed by seed.
        tokens_per_second: of all its runs together.
    """

    layer: str
    d_model: int
    parameters: int
    rate: float
    accuracy: dict[str, list[float]]
    tokens_per_second: float


def read_sweep(path: Path) -> list[tuple[str, Plan]]:
    """The plans of a sweep, each with the name of its folder.

    Raises:
        ModelError: the file is no sweep; the message names what is wrong in it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not TOML: {error}.") from error
    _check(path, data)
    widths = data.get("widths", [64])
    plans = [_plan(data, layer, width) for layer in data["layers"] for width in widths]
    return [(f"{Path(plan.layer).name}-{plan.d_model}", plan) for plan in plans]


def run_sweep(
    path: Path,
    out: Path,
    *,
    report: Callable[..., None],
    stage: Callable[[str], None],
    deadline: float = math.inf,
) -> tuple[list[Line], str | None]:
    """Train what is not trained yet, and gather the table.

    Returns:
        The lines of what is finished, and the run at which the deadline came, if it did.
    """
    lines = []
    for name, plan in read_sweep(path):
        folder = RunFolder(out / name)
        if not folder.plan_file.exists():
            folder.create(plan)
        elif replace(folder.plan(), course=plan.course) != plan:
            raise ModelError(
                f"{folder.path} holds a run of another plan than {path}; name another `--out`."
            )
        stage(name)
        found = folder.record() or finish(
            folder,
            report=report,
            stage=stage,
            command=f"mbd sweep {path} --out {out}",
            deadline=deadline,
        )
        if found is None:
            return lines, name
        lines.append(summary(plan, found["metrics"]))
    return lines, None


def summary(plan: Plan, metrics: Mapping[str, Any]) -> Line:
    """The line of a layer: the rate is chosen on validation rows, and reported on test rows."""
    best = best_rate(plan, metrics["validation"])
    return Line(
        plan.layer,
        plan.d_model,
        metrics["parameters"],
        best,
        {name: of_rate(plan, "accuracy", found, best) for name, found in metrics["test"].items()},
        metrics["tokens_per_second"],
    )


def _plan(data: Mapping[str, Any], layer: str, width: int) -> Plan:
    task = TASKS[data["task"]]
    if data.get("preset", "small") == "zoology":
        plan = zoology_plan(task.name, layer, data.get("epochs", ZOOLOGY_EPOCHS))
    else:
        rows = replace(small_rows(task), **data.get("rows", {}))
        batch, steps = data.get("batch", small_batch(rows)), data.get("steps", SMALL_STEPS)
        plan = small_plan(task.name, layer, rows, batch=batch, steps=steps)
    given = {name: tuple(data[name]) for name in ("rates", "seeds") if name in data}
    return replace(
        plan,
        d_model=width,
        heads=data.get("heads", 2),
        expansion=data.get("expansion"),
        **given,
    )


def _check(path: Path, data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name not in _KINDS:
            raise ModelError(f"{path}: `{name}` is unknown; a sweep holds {', '.join(_KINDS)}.")
        if not isinstance(value, _KINDS[name]) or (isinstance(value, list) and not value):
            kind = {list: "a list that is not empty", dict: "a table"}.get(
                _KINDS[name], f"of type {_KINDS[name].__name__}"
            )
            raise ModelError(f"{path}: `{name}` is {value!r}; it must be {kind}.")
    missing = [name for name in ("task", "layers") if name not in data]
    if missing:
        raise ModelError(f"{path}: `{missing[0]}` is missing.")
    if data["task"] not in TASKS:
        raise ModelError(
            f"{path}: `task` is {data['task']!r}; it must be one of {', '.join(TASKS)}."
        )
    if data.get("preset", "small") not in PRESETS:
        raise ModelError(f"{path}: `preset` is {data['preset']!r}; it is small or zoology.")
    fixed = [name for name in ("steps", "batch", "rows") if name in data]
    if data.get("preset") == "zoology" and fixed:
        raise ModelError(f"{path}: the preset zoology fixes the course; leave out `{fixed[0]}`.")
    if data.get("preset", "small") == "small" and "epochs" in data:
        raise ModelError(
            f"{path}: `epochs` is for the preset zoology; the preset small has `steps`."
        )
    own = [field.name for field in fields(TASKS[data["task"]].rows)]
    foreign = [name for name in data.get("rows", {}) if name not in own]
    if foreign:
        raise ModelError(
            f"{path}: rows of {data['task']} have no `{foreign[0]}`; they have {', '.join(own)}."
        )
