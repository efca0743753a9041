"""`mbd pretrain`: its options, and what it does."""

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
from .option_types import above_zero, amount
from .time_limit import stopped

_SIZES = {
    "vocabulary": (4096, "tokens, made of the text"),
    "d_model": (768, "width"),
    "depth": (7, "blocks"),
    "heads": (6, "memories side by side"),
    "key_width": (64, "of each memory"),
    "value_width": (128, "of each memory"),
}


def add_pretrain_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd pretrain`."""
    command.add_argument(
        "texts", type=Path, nargs="*", metavar="TEXT", help="files: plain text, .xz or .gz"
    )
    add_text_options(command)
    for name, (default, what) in _SIZES.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=amount, default=default, help=f"{what} (default {default})")
    command.add_argument("--batch", type=amount, default=64, help="rows (default 64)")
    command.add_argument(
        "--tokens", type=amount, default=200_000_000, help="to read in all (default 200M)"
    )
    command.add_argument(
        "--rate", type=above_zero, default=2e-3, help="learning rate (default 2e-3)"
    )


def run_pretrain(request: argparse.Namespace) -> tuple[int, Any]:
    """Train a Gated DeltaNet on text, and print what came of it."""
    from dataclasses import asdict

    from design_models import ModelError

    from .language.pretraining import Pretraining, Sizes, pretrain, pretraining_of
    from .language.run_files import RunFiles

    files = RunFiles(request.out)
    if request.resume:
        plan = pretraining_of(files.read_plan())
    else:
        if not request.texts:
            raise ModelError("`TEXT` is missing; name files of text to train on.")
        plan = Pretraining(
            absolute(request.texts),
            absolute(request.valid),
            str(Path(cache_of(request)).resolve()),
            Sizes(**{name: getattr(request, name) for name in _SIZES}),
            mixture_of(request),
            batch=request.batch,
            tokens=request.tokens,
            rate=request.rate,
            answers=request.answers,
            seed=request.seed,
            compute="float32" if request.float32 else "bfloat16",
        )
        devices_of(request, plan.batch)  # what cannot be is found before a folder is made
        files.create_folder(asdict(plan))
    found = carried_out(request, pretrain, plan)
    if found is None:
        return stopped(request)
    told, tested = found["metrics"], found["metrics"]["held_out"]
    print(
        f"{told['parameters']:,} parameters, {told['tokens']:,} tokens at "
        f"{told['tokens_per_second']:,.0f} a second; held out: perplexity "
        f"{tested['perplexity']:.2f}, needles found {tested['retrieved']:.1%}"
    )
    print(f"model: {files.model}; record: {files.record_file}")
    return 0, found
