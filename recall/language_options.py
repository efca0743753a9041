"""Options that `mbd pretrain` and `mbd distill` share, and how they run."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_text_options(command: argparse.ArgumentParser) -> None:
    """What text, in which mixture, on how many devices."""
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the run")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument(
        "--minutes",
        type=above_zero,
        metavar="N",
        help="stop training after so long, with a checkpoint to go on from; testing is not cut",
    )
    command.add_argument(
        "--valid", type=Path, nargs="+", default=[], metavar="FILE", help="text that is held out"
    )
    command.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of tokens, to share (default: in --out)"
    )
    command.add_argument("--length", type=positive, default=1024, help="of rows (default 1024)")
    command.add_argument(
        "--needles", type=share, default=0.4, help="share of rows with needle texts (default 0.4)"
    )
    command.add_argument(
        "--needle-rows", type=positive, default=16384, help="that are made (default 16384)"
    )
    command.add_argument(
        "--answers", type=above_zero, default=5.0, help="weight of answers' tokens (default 5)"
    )
    command.add_argument(
        "--devices", type=positive, help="that share a batch (default: all that divide it)"
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


def deadline_of(request: argparse.Namespace) -> float:
    return math.inf if request.minutes is None else time.perf_counter() + 60 * request.minutes


def positive(text: str) -> int:
    """A whole number from 1; 200M and 64k are understood."""
    units = {"k": 10**3, "M": 10**6, "G": 10**9}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(digits) * unit


def above_zero(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 to 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
