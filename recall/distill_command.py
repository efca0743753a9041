"""`mbd distill`: its options, and what it does."""

import argparse
from pathlib import Path
from typing import Any

from .language_options import (
    absolute,
    add_text_options,
    cache_of,
    carried_out,
    devices_of,
    mixture_of,
)
from .option_types import above_zero, amount, share, whole
from .terminal import console
from .time_limit import stopped


def add_distill_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd distill`."""
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the teacher: a checkpoint, with tokenizer.json"
    )
    command.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="TEXT", help="plain text, .xz or .gz"
    )
    command.add_argument(
        "--layers", type=whole(0), nargs="+", metavar="N", help="blocks, from 0 (default: all)"
    )
    command.add_argument(
        "--heads", type=whole(0), nargs="+", metavar="N", help="of each, from 0 (default: all)"
    )
    command.add_argument(
        "--restoration",
        type=share,
        default=0.9,
        metavar="λ",
        help="to begin with: 0 is the teacher, 1 the exact filter; from 0.99 on, heads that never "
        "forget may stay exact (default 0.9)",
    )
    command.add_argument("--hold", action="store_true", help="keep λ where it begins")
    command.add_argument(
        "--control", action="store_true", help="restore nothing: go on training the teacher alike"
    )
    command.add_argument(
        "--matching", type=whole(0), default=100, help="steps on layers' outputs (default 100)"
    )
    command.add_argument(
        "--steps", type=amount, default=400, help="on answers, after these (default 400)"
    )
    command.add_argument(
        "--task", type=share, default=0.5, help="share of the loss on text itself (default 0.5)"
    )
    command.add_argument("--batch", type=amount, default=32, help="rows (default 32)")
    command.add_argument(
        "--rate", type=above_zero, default=3e-4, help="learning rate (default 3e-4)"
    )
    command.add_argument(
        "--dial-rate", type=above_zero, default=2e-2, help="of λ, σ², drift (default 2e-2)"
    )
    command.add_argument(
        "--lean", action="store_true", help="compute blocks again for gradients: less memory"
    )
    add_text_options(command)


def run_distill(request: argparse.Namespace) -> tuple[int, Any]:
    """Distil Bayesian Layers into a teacher, and print what came of it."""
    from dataclasses import asdict

    import jax

    from design_models import ModelError

    from .language.distillation import Distillation, begun, distill, distillation_of
    from .language.reports import distillation_table, inside_table
    from .language.run_files import RunFiles

    files = RunFiles(request.out)
    if request.resume:
        plan = distillation_of(files.read_plan())
    else:
        if not request.text:
            raise ModelError("`--text` is missing; name files of text to train on.")
        plan = Distillation(
            str(request.folder.resolve()),
            absolute(request.text),
            absolute(request.valid),
            str(Path(cache_of(request)).resolve()),
            layers=_given(request.layers),
            heads=_given(request.heads),
            restoration=request.restoration,
            learned=not request.hold,
            control=request.control,
            matching=request.matching,
            steps=request.steps,
            task=request.task,
            answers=request.answers,
            batch=request.batch,
            rate=request.rate,
            dial_rate=request.dial_rate,
            mixture=mixture_of(request),
            seed=request.seed,
            compute="float32" if request.float32 else "bfloat16",
            lean=request.lean,
        )
        devices_of(request, plan.batch)
        with jax.enable_x64(False):
            begun(plan)  # what cannot be is found before a folder is made
        files.create_folder(asdict(plan))
    found = carried_out(request, distill, plan)
    if found is None:
        return stopped(request)
    console().print(distillation_table(found["metrics"]))
    if found["metrics"]["after"]["inside"]:
        console().print(inside_table(found["metrics"]["after"]["inside"]))
    print(f"student: {files.model}; record: {files.record_file}")
    return 0, found


def _given(numbers: list[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)
