"""`--minutes`: work that stops after so long, with a checkpoint to go on from."""

import argparse
import math
import time
from typing import Any

from .option_types import above_zero


def add_minutes(command: argparse.ArgumentParser) -> None:
    """The option."""
    command.add_argument(
        "--minutes",
        type=above_zero,
        metavar="N",
        help="stop training after so long, with a checkpoint to go on from; testing is not cut",
    )


def deadline_of(request: argparse.Namespace) -> float:
    """`time.perf_counter()` at which to stop."""
    return math.inf if request.minutes is None else time.perf_counter() + 60 * request.minutes


def stopped(request: argparse.Namespace) -> tuple[int, Any]:
    """What a command that was stopped says and returns."""
    print(f"stopped with a checkpoint after {request.minutes:g} minutes; --resume goes on")
    return 0, {"finished": False}
