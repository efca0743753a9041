"""Options that `mbd pretrain` and `mbd distill` share, and how they run."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .option_types import above_zero, amount, share
from .terminal import ProgressBar
from .time_limit import add_minutes, deadline_of


def add_text_options(command: argparse.ArgumentParser) -> None:
    """What text, in which mixture, on how many devices."""
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the run")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add_minutes(command)
    command.add_argument(
        "--valid", type=Path, nargs="+", default=[], metavar="FILE", help="text that is held out"
    )
    command.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of tokens, to share (default: in --out)"
    )
    command.add_argument("--length", type=amount, default=1024, help="of rows (default 1024)")
    command.add_argument(
        "--needles", type=share, default=0.4, help="share of rows with needle texts (default 0.4)"
    )
    command.add_argument(
        "--needle-rows", type=amount, default=16384, help="that are made (default 16384)"
    )
    command.add_argument(
        "--answers", type=above_zero, default=5.0, help="weight of answers' tokens (default 5)"
    )
    command.add_argument(
        "--devices", type=amount, help="that share a batch (default: all that divide it)"
    )
    command.add_argument("--seed", type=int, default=0, help="of draws (default 0)")
    command.add_argument(
        "--float32", action="store_true", help="compute in float32 (default: bfloat16)"
    )


def mixture_of(request: argparse.Namespace) -> Any:
    from .text.corpus import Mixture

    return Mixture(request.length, request.needles, request.needle_rows)


def cache_of(request: argparse.Namespace) -> str:
    return str(request.cache or request.out / "tokens")


def absolute(paths: Sequence[Path]) -> tuple[str, ...]:
    """Where files lie, whatever folder the run goes on from.

    Raises:
        ModelError: one is not there.
    """
    from design_models import ModelError

    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ModelError(f"`TEXT` is {missing[0]}; name a file of text, plain, .xz or .gz.")
    return tuple(str(path.resolve()) for path in paths)


def devices_of(request: argparse.Namespace, batch: int) -> int:
    """Devices that share a batch.

    Raises:
        ModelError: there are not so many, or they do not divide it.
    """
    import jax

    from design_models import ModelError

    available = len(jax.devices())
    if request.devices is None:
        return max(count for count in range(1, available + 1) if batch % count == 0)
    if request.devices > available:
        raise ModelError(f"`--devices` is {request.devices}; JAX has {available} here.")
    if batch % request.devices:
        raise ModelError(f"`--batch` is {batch}, no multiple of `--devices` {request.devices}.")
    return request.devices


def carried_out(
    request: argparse.Namespace, work: Callable[..., dict[str, Any] | None], plan: Any
) -> dict[str, Any] | None:
    """Run a plan with a progress bar: its record, or None where the minutes ran out.

    Args:
        request: of the command.
        work: `pretrain` or `distill`.
        plan: what it is told to do.
    """
    import jax

    with jax.enable_x64(False), ProgressBar() as bar:
        return work(
            request.out,
            plan,
            devices=devices_of(request, plan.batch),
            show=bar.show,
            stage=bar.stage,
            command=shlex.join(["mbd", *sys.argv[1:]]),
            deadline=deadline_of(request),
        )
