"""`mbd predict`: its options, and what it does."""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from .terminal import Status, console

ORDER_NAMES = ("after", "before", "alternate")
"""As in `recall.prediction`, which takes JAX to import."""


def add_predict_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd predict`."""
    command.add_argument(
        "layer", nargs="?", default="bayesian_layer", metavar="LAYER", help="of the catalogue"
    )
    whole, ratio = _number(int, 1), _number(float, 0, exclusive=True)
    command.add_argument("--writes", type=whole, default=1, help="of the target (default 1)")
    command.add_argument(
        "--distractors", type=_number(int, 0), default=64, help="writes of others (default 64)"
    )
    command.add_argument(
        "--overlap",
        type=_number(float, -1, 1),
        metavar="COSINE",
        help="the others have one key, of this cosine to the target's; random keys without",
    )
    command.add_argument(
        "--decay", type=_number(float, 0, 1, exclusive=True), default=1.0, help="at every write"
    )
    command.add_argument(
        "--drift", type=_number(float, 0), default=0.0, help="variance added at every write"
    )
    command.add_argument(
        "--noise", type=ratio, default=0.1, metavar="RATIO", help="to prior variance (default 0.1)"
    )
    command.add_argument(
        "--width", type=_number(int, 2, 1024), default=64, help="entries of keys (default 64)"
    )
    command.add_argument(
        "--order",
        choices=ORDER_NAMES,
        default="after",
        help="others after the target (default), before it, or in turn with it (--overlap)",
    )
    command.add_argument(
        "--draws", type=_number(int, 2), default=64, help="of keys, in simulation (default 64)"
    )
    command.add_argument("--seed", type=_number(int, 0), default=0, help="of the draws (default 0)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="of a record and a plot")


def run_predict(request: argparse.Namespace) -> tuple[int, Any]:
    """Predict and simulate; 1 where simulation departs from a closed form."""
    from dataclasses import asdict

    from design_models import ModelError

    from .prediction import Regime, forecast, without_form
    from .prediction_reports import forecast_table, plot_forecast
    from .records import record, write_json

    if request.out is not None:
        try:
            request.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"`--out` is {request.out}: {error.strerror}; name another folder."
            raise ModelError(message) from error
    names = ("writes", "distractors", "overlap", "decay", "drift", "noise", "width", "order")
    regime = Regime(**{name: getattr(request, name) for name in names})
    start = time.perf_counter()
    with Status(f"simulating {request.layer}"):
        curves = forecast(request.layer, regime, request.draws, request.seed)
    title = f"{request.layer}: {_in_words(regime)}"
    print(title)
    for axis in dict.fromkeys(curve.axis for curve in curves):
        console().print(forecast_table([one for one in curves if one.axis == axis]))
    missing = without_form(curves)
    if missing:
        print(f"no closed form here of {', '.join(missing)}: simulation alone")
    wrong = [curve.quantity for curve in curves if curve.departs]
    if wrong:
        print(f"simulation departs from the closed form of {', '.join(wrong)}")
    given = [
        word
        for name in (*names, "draws", "seed")
        if getattr(request, name) is not None
        for word in (f"--{name}", str(getattr(request, name)))
    ]
    found = record(
        {"layer": request.layer, **asdict(regime), "draws": request.draws},
        [curve.as_record() for curve in curves],
        command=shlex.join(["mbd", "predict", request.layer, *given]),
        seed=request.seed,
        seconds=time.perf_counter() - start,
    )
    if request.out is not None:
        plot_forecast(request.out / "forecast.png", title, curves)
        write_json(request.out / "record.json", found)
        print(f"record and plot: {request.out}")
    return int(bool(wrong)), found


def _in_words(regime: Any) -> str:
    what = f"written {regime.writes} times" if regime.writes > 1 else "written once"
    others = "random keys" if regime.overlap is None else f"a key of cosine {regime.overlap:g}"
    if regime.order == "alternate":
        others = f"in turn with {others}"
    else:
        place = "before" if regime.order == "after" else "after"
        others = f"{place} {regime.distractors} others with {others}"
    forgets = f", decay {regime.decay:g}, drift {regime.drift:.3g}" if regime.forgets else ""
    return f"{what} {others}, noise {regime.noise:g}, width {regime.width}{forgets}"


def _number(
    kind: type, least: int | float, most: int | float = float("inf"), *, exclusive: bool = False
) -> Any:
    """A number in a range; `exclusive` leaves the lower end out."""

    def number(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            found = None
        low = found is not None and (found > least if exclusive else found >= least)
        if found is None or not low or not found <= most or found == float("inf"):
            word = "whole number" if kind is int else "number"
            start = f"above {least:g}" if exclusive else f"from {least:g}"
            end = "" if most == float("inf") else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {word} {start}{end}")
        return found

    return number
