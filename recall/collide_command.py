"""`mbd collide`: its options, and what it does."""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from .option_types import whole
from .terminal import Status, console

STUDY_NAMES = ("one_key", "confidence", "overlap", "crowd", "forgetting", "reliability")
"""As in `recall.collisions.catalogue`, which takes JAX to import."""


def add_collide_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd collide`."""
    command.add_argument(
        "studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDY_NAMES)}; none: all"
    )
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="of the catalogue; all where left out"
    )
    command.add_argument(
        "--noise",
        type=_noise,
        default=0.1,
        metavar="RATIO",
        help="of noise to prior variance, as layers take it (default 0.1); a delta rule's β is "
        "1/(1 + RATIO)",
    )
    command.add_argument("--seed", type=whole(0), default=0, help="of all draws (default 0)")
    command.add_argument(
        "--seeds",
        type=whole(2),
        default=16,
        metavar="N",
        help="draws of keys (default 16)",
    )
    command.add_argument("--out", type=Path, metavar="FOLDER", help="of a record and plots")


def run_collide(request: argparse.Namespace) -> tuple[int, Any]:
    """Run the studies; 1 where a measurement departs from its closed form."""
    from dataclasses import asdict

    from design_models import CATALOGUE, ModelError

    from .collision_plots import plot_study
    from .collision_reports import departures, study_table
    from .collisions.catalogue import STUDIES, run
    from .collisions.curves import Setting
    from .records import record, write_json

    names = list(dict.fromkeys(request.studies)) or list(STUDIES)
    layers = list(dict.fromkeys(request.layers or CATALOGUE))
    for argument, given, known in (("STUDY", names, STUDIES), ("--layers", layers, CATALOGUE)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ModelError(f"`{argument}` is {unknown[0]!r}; known: {', '.join(known)}.")
    if request.out is not None:
        try:
            request.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"`--out` is {request.out}: {error.strerror}; name another folder."
            raise ModelError(message) from error
    start = time.perf_counter()
    setting = Setting(noise=request.noise, draws=request.seeds, seed=request.seed)
    with Status("colliding") as status:
        curves = run(names, layers, setting, status.stage)
    for name in names:
        console().print(study_table(name, curves))
    wrong = departures(curves)
    console().print(wrong)
    words = [*request.studies, *(["--layers", *layers] if request.layers else [])]
    words += ["--noise", f"{request.noise:g}", "--seeds", str(request.seeds)]
    words += ["--seed", str(request.seed)]
    found = record(
        {"studies": names, "layers": layers, **asdict(setting)},
        [curve.as_record() for curve in curves],
        command=shlex.join(["mbd", "collide", *words]),
        seed=request.seed,
        seconds=time.perf_counter() - start,
    )
    if request.out is not None:
        for name in names:
            plot_study(request.out / f"{name}.png", name, curves)
        write_json(request.out / "record.json", found)
        print(f"record and plots: {request.out}")
    return int(any(curve.departs for curve in curves)), found


def _noise(text: str) -> float:
    try:
        noise = float(text)
    except ValueError:
        noise = 0.0
    if not 0 < noise < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio; give a number above 0")
    return noise
