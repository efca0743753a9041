"""`mbd train` and `mbd eval`: their options, and what they do."""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .mesh_sizes import read_sizes
from .option_types import above_zero, whole
from .task_options import TASK_NAMES, add_row_options, chosen_rows
from .terminal import ProgressBar, console
from .time_limit import add_minutes, deadline_of, stopped


def add_train_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd train`."""
    command.add_argument("task", choices=TASK_NAMES, metavar="TASK", help=", ".join(TASK_NAMES))
    command.add_argument(
        "--layer", metavar="NAME", help="of the catalogue, attention, or FILE.py:OBJECT"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the run")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument(
        "--preset",
        choices=("small", "zoology"),
        default="small",
        help="small: minutes on two cores (default); zoology: the published protocol",
    )
    command.add_argument("--d-model", type=whole(1), help="width (default 64)")
    command.add_argument("--heads", type=whole(1), help="memories side by side (default 2)")
    command.add_argument(
        "--expansion",
        type=whole(1),
        metavar="N",
        help="values N times as wide as keys, for memories of one size (default: as published)",
    )
    command.add_argument(
        "--rates", type=above_zero, nargs="+", metavar="RATE", help="learning rates"
    )
    command.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of parameters")
    command.add_argument("--steps", type=whole(1), help="small: steps (default 600)")
    command.add_argument(
        "--batch", type=whole(1), help="small: rows (default 64, fewer where they are long)"
    )
    add_minutes(command)
    command.add_argument(
        "--mesh",
        type=read_sizes,
        metavar="AXIS=N,...",
        help="devices that share the run: data (rows), heads, sequence (time)",
    )
    command.add_argument(
        "--processes",
        type=whole(1),
        default=1,
        metavar="N",
        help="of the run: SLURM's, Kubernetes', or else started on this host (default 1)",
    )
    add_row_options(command)


def add_eval_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd eval`."""
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument(
        "--beyond", action="store_true", help="also on rows past what training showed"
    )
    command.add_argument("--examples", type=whole(1), default=256, help="rows (default 256)")


def add_sweep_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd sweep`."""
    command.add_argument(
        "file", type=Path, metavar="FILE.toml", help="layers, widths, rates, seeds"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of all runs")
    add_minutes(command)


def run_train(request: argparse.Namespace) -> tuple[int, Any]:
    """Train, and print what came of it; in several processes where they are asked for."""
    if request.processes == 1:
        return _train(request)
    from .processes import LostProcess, joined, leave, run_here
    from .run_folder import RunFolder

    folder, member = RunFolder(request.out), joined(request.processes)
    try:
        if member:
            return _train_together(request)
        code = run_here([sys.executable, "-m", "recall.cli", *sys.argv[1:]], request.processes)
    except LostProcess as lost:
        print(
            f"mbd train: {lost}, so the run stopped; add --resume to go on after step "
            f"{folder.saved_step()}",
            file=sys.stderr,
        )
        if member:
            leave(1)
        return 1, None
    return code, folder.record()


def _train_together(request: argparse.Namespace) -> tuple[int, Any]:
    """Train as one of several processes, of which the first prints and writes.

    Raises:
        LostProcess: another ended, or cannot be reached.
    """
    import jax

    from .processes import LostProcess

    try:
        return _train(request)
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise LostProcess(f"a process of the run ended or failed ({first_line})") from error


def _train(request: argparse.Namespace) -> tuple[int, Any]:
    import jax

    from design_models import ModelError

    from .layers_by_name import mixer_maker
    from .meshes import check_plan, make_mesh
    from .processes import wait_for_all
    from .run import finish
    from .run_folder import RunFolder
    from .training_reports import training_table

    folder, sizes = RunFolder(request.out), request.mesh or {}
    if request.processes > 1 and not sizes:
        raise ModelError("`--mesh` is missing; say what processes share, as in --mesh data=2.")
    mesh = make_mesh(sizes) if sizes else None
    plan = folder.plan() if request.resume else _plan(request)
    if plan.task != request.task:
        raise ModelError(f"{request.out} holds a run of {plan.task}, not {request.task}.")
    mixer_maker(plan.layer, plan.heads, expansion=plan.expansion)  # wrong names come to light
    check_plan(plan, sizes)
    if not request.resume:
        if jax.process_index() == 0:
            folder.create(plan)
        wait_for_all("the folder")
    with jax.enable_x64(False), ProgressBar() as bar:
        found = finish(
            folder,
            mesh=mesh,
            report=bar.report,
            stage=bar.stage,
            command=shlex.join(["mbd", *sys.argv[1:]]),
            deadline=deadline_of(request),
        )
    if jax.process_index() > 0:
        return 0, None
    if found is None:
        return stopped(request)
    console().print(training_table(folder.plan(), found["metrics"]))
    print(f"record and plots: {folder.path}")
    return 0, found


def run_eval(request: argparse.Namespace) -> tuple[int, Any]:
    """Score a run, and print the table."""
    import jax

    from .run import beyond
    from .run_folder import RunFolder
    from .training_reports import beyond_table, honesty_table

    folder, command = RunFolder(request.run), shlex.join(["mbd", *sys.argv[1:]])
    with jax.enable_x64(False), ProgressBar() as bar:
        found = beyond(folder, request.examples, request.beyond, bar.stage, command)
    told = folder.plan(), found["metrics"]["rate"], found["metrics"]["scores"]
    console().print(beyond_table(*told))
    honesty = honesty_table(*told)
    if honesty.row_count:
        console().print(honesty)
    return 0, found


def run_sweep(request: argparse.Namespace) -> tuple[int, Any]:
    """Train what a sweep asks for, and print one table."""
    from dataclasses import asdict

    import jax

    from . import sweep
    from .training_reports import sweep_table

    with jax.enable_x64(False), ProgressBar() as bar:
        lines, unfinished = sweep.run_sweep(
            request.file,
            request.out,
            report=bar.report,
            stage=bar.stage,
            deadline=deadline_of(request),
        )
    if lines:
        console().print(sweep_table(lines))
    if unfinished is not None:
        print(
            f"stopped with a checkpoint of {unfinished} after {request.minutes:g} minutes; the "
            "same command goes on"
        )
    return 0, [asdict(line) for line in lines]


def _plan(request: argparse.Namespace) -> Any:
    from design_models import ModelError

    from .plans import SMALL_STEPS, small_batch, small_plan, small_rows, zoology_plan
    from .tasks.catalogue import TASKS

    if request.layer is None:
        raise ModelError("`--layer` is missing; name a layer, as in --layer bayesian_layer.")
    task = TASKS[request.task]
    if request.preset == "zoology":
        rows = chosen_rows(task, request)
        given = [name for name in ("steps", "batch") if getattr(request, name) is not None]
        if given or rows != task.rows:
            what = f"`--{given[0]}`" if given else "rows of your own"
            raise ModelError(f"`--preset zoology` fixes the course; leave out {what}.")
        plan = zoology_plan(task.name, request.layer)
    else:
        rows = chosen_rows(replace(task, rows=small_rows(task)), request)
        steps, batch = request.steps or SMALL_STEPS, request.batch or small_batch(rows)
        plan = small_plan(task.name, request.layer, rows, batch=batch, steps=steps)
    changes = {
        name: getattr(request, name) for name in ("d_model", "heads", "rates", "seeds", "expansion")
    }
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in changes.items()
        if value is not None
    }
    plan = replace(plan, **given)
    if plan.d_model % plan.heads:
        raise ModelError(f"`--d-model` is {plan.d_model}, no multiple of `--heads` {plan.heads}.")
    return plan
