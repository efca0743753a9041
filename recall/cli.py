"""The `mbd` command."""

import argparse
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .collide_command import add_collide_options, run_collide
from .convert_command import add_convert_options, run_convert
from .distill_command import add_distill_options, run_distill
from .predict_command import add_predict_options, run_predict
from .pretrain_command import add_pretrain_options, run_pretrain
from .ruler_command import add_ruler_options, run_ruler
from .task_options import TASK_NAMES, add_row_options, chosen_rows
from .terminal import Status, console
from .train_commands import (
    add_eval_options,
    add_sweep_options,
    add_train_options,
    run_eval,
    run_sweep,
    run_train,
)

HELD, FAILED, WRONG_REQUEST = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Answers a wrong request in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_REQUEST, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mbd`; return its exit code: 0 success, 1 a check failed, 2 a wrong request."""
    request = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries; ours are errors and say what to do
            code = _run(request)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("mbd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports it; nothing is known to hold


def _run(request: argparse.Namespace) -> int:
    import jax

    from design_models import ModelError

    try:
        with jax.enable_x64(True):
            record_file = _record_file(request)
            code, record = request.command(request)
            if record_file is not None and record is not None:
                _write(record_file, record)
    except ModelError as error:
        return _wrong_request(request, error, str(error))
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # of the user's own functions
        whose = "a function of the model" if request.name == "verify" else "the command"
        return _wrong_request(request, error, _raised(error, whose))
    return code


def _raised(error: BaseException, whose: str = "a function of the model") -> str:
    from .user_files import raised

    return f"{whose} {raised(error)} `--debug` shows the traceback."


@contextmanager
def _naming(name: str, names: Sequence[str]) -> Iterator[None]:
    """Of several subjects, say which one an error is about."""
    from design_models import ModelError

    try:
        yield
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:
        if len(names) == 1:
            raise
        message = str(error) if isinstance(error, ModelError) else _raised(error)
        raise ModelError(f"{name}: {message}") from error


def _wrong_request(request: argparse.Namespace, error: BaseException, message: str) -> int:
    if request.debug:
        traceback.print_exception(error)
    print(f"mbd {request.name}: {' '.join(message.split())}", file=sys.stderr)
    return WRONG_REQUEST


def _write(path: Path, record: Any) -> None:
    from design_models import ModelError

    from .records import write_json

    try:
        write_json(path, record)
    except OSError as error:
        raise ModelError(f"`--json` is {path}: {error.strerror}; name another file.") from error


def _record_file(request: argparse.Namespace) -> Path | None:
    from design_models import ModelError

    if request.json is None:
        return None
    path = Path(request.json)
    if path.is_dir() or not path.parent.is_dir():
        raise ModelError(f"`--json` is {path}; name a file in a folder that exists.")
    is_new = not path.exists()
    try:
        path.open("a").close()  # found out before the work rather than after it
    except OSError as error:
        raise ModelError(f"`--json` is {path}: {error.strerror}; name another file.") from error
    if is_new:
        path.unlink()
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mbd",
        description="State what a memory does as a NumPyro model; get its exact filter, proved.",
        epilog="example: mbd new my_memory.py && mbd verify my_memory.py:model",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    models = _command(commands, "models", _models, "list the catalogue", "mbd models")
    del models

    verify = _command(
        commands,
        "verify",
        _verify,
        "derive the exact filter of design models, and verify it against three oracles",
        "mbd verify bayesian_layer\n"
        "         mbd verify my_memory.py:model --update my_memory.py:my_update",
    )
    verify.add_argument(
        "subjects",
        nargs="*",
        metavar="NAME or FILE.py:OBJECT",
        help="entries of the catalogue or models of your own; none: the whole catalogue",
    )
    verify.add_argument(
        "--update",
        metavar="FILE.py:FUNCTION",
        help="check a hand-derived update(mean, covariance, u) -> (mean, covariance) too",
    )
    verify.add_argument("--seed", type=_seed, default=0, help="seed of all draws (default 0)")

    new = _command(
        commands,
        "new",
        _new,
        "write a design model to start from, which verifies as it stands",
        "mbd new my_memory.py",
    )
    new.add_argument("file", type=Path, metavar="FILE.py")

    recall = _command(
        commands,
        "recall",
        _recall,
        "run verified filters over a recall batch, without training",
        "mbd recall batch.npz --widths 8 16 32",
    )
    recall.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.npz", help="none: the batch that comes along"
    )
    recall.add_argument(
        "--widths",
        type=_width,
        nargs="+",
        default=[8, 16, 32, 64],
        metavar="N",
        help="entries of keys and values (default 8 16 32 64)",
    )
    recall.add_argument("--seed", type=_seed, default=0, help="seed of the tokens' directions")

    collide = _command(
        commands,
        "collide",
        run_collide,
        "let keys collide in layers that have learned nothing, and compare with closed forms",
        "mbd collide crowd --layers deltanet bayesian_layer --out runs/collisions",
    )
    add_collide_options(collide)

    predict = _command(
        commands,
        "predict",
        run_predict,
        "predict in closed form what a layer will keep, and simulate it",
        "mbd predict bayesian_layer --writes 4 --distractors 128 --decay 0.99 --drift 0.02\n"
        "         mbd predict deltanet --overlap 0.7 --distractors 16 --out runs/forecast",
    )
    add_predict_options(predict)

    batch = _command(
        commands,
        "batch",
        _batch,
        "write a batch of a recall task, to look at or to use elsewhere",
        "mbd batch mqar --vocab 8192 --length 128 --pairs 16 --examples 64 --seed 5678 "
        "--out batch.npz",
    )
    batch.add_argument("task", choices=TASK_NAMES, metavar="TASK", help=", ".join(TASK_NAMES))
    add_row_options(batch)
    batch.add_argument("--examples", type=_count, default=64, help="rows (default 64)")
    batch.add_argument("--seed", type=_seed, default=0, help="seed of all draws (default 0)")
    batch.add_argument(
        "--filler-seed",
        type=_seed,
        help="mqar, mqar_overwrite: seed of random filler tokens; they stay 0 without",
    )
    batch.add_argument(
        "--training",
        action="store_true",
        help="in_context_recall, noisy_recall, fuzzy_recall: label every position, as in training",
    )
    batch.add_argument("--out", type=Path, required=True, metavar="FILE.npz")

    train = _command(
        commands,
        "train",
        run_train,
        "train a layer on a recall task; a run that was stopped goes on where it was",
        "mbd train mqar --layer bayesian_layer --out runs/a\n"
        "         mbd train mqar --out runs/a --resume\n"
        "         mbd train mqar --layer gla --mesh data=2,sequence=4 --out runs/b",
    )
    add_train_options(train)

    evaluate = _command(
        commands,
        "eval",
        run_eval,
        "score a trained run: accuracy, calibration, and which answers it had better withhold",
        "mbd eval runs/a --beyond",
    )
    add_eval_options(evaluate)

    sweep = _command(
        commands,
        "sweep",
        run_sweep,
        "train layers x widths x rates x seeds from a TOML file; goes on where it was stopped",
        "mbd sweep sweep.toml --out runs/sweep",
    )
    add_sweep_options(sweep)

    convert = _command(
        commands,
        "convert",
        run_convert,
        "read a Gated DeltaNet or DeltaNet checkpoint of flash-linear-attention",
        "mbd convert checkpoint --check expected.safetensors\n"
        "         mbd convert checkpoint --out written_back",
    )
    add_convert_options(convert)

    ruler = _command(
        commands,
        "ruler",
        run_ruler,
        "measure how well a checkpoint finds things in long texts, with RULER's tasks",
        "mbd ruler checkpoint --out runs/ruler --lengths 1024,2048 --samples 100\n"
        "         mbd ruler checkpoint --out runs/ruler --tasks niah_single_1,vt --dtype bfloat16",
    )
    add_ruler_options(ruler)
    pretrain = _command(
        commands,
        "pretrain",
        run_pretrain,
        "train a Gated DeltaNet on text of yours mixed with needle texts; leaves a checkpoint",
        "mbd pretrain books.txt --valid other.txt --out runs/teacher --minutes 10\n"
        "         mbd pretrain --out runs/teacher --resume",
    )
    add_pretrain_options(pretrain)

    distill = _command(
        commands,
        "distill",
        run_distill,
        "distil Bayesian Layers into a checkpoint; --control goes on training it, to compare",
        "mbd distill runs/teacher/model --text books.txt --layers 2 4 --out runs/student\n"
        "         mbd distill runs/teacher/model --text books.txt --control --out runs/control",
    )
    add_distill_options(distill)

    bench = _command(
        commands,
        "bench",
        _bench,
        "time the scans, forward and with gradients, beside a peer where it is installed",
        "mbd bench delta gla --json results/bench.json",
    )
    bench.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="comparisons: exact, delta, ssd, gla, kda, length, parallel; none: all that suit the "
        "device",
    )
    bench.add_argument("--seed", type=_seed, default=0, help="seed of the streams (default 0)")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Any], does: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=does,
        description=does,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", metavar="FILE", help="also write a machine-readable result")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(command=run, name=name)
    return command


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows; give at least 1")
    return int(text)


def _width(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width; give a number from 1 to 1024")
    return int(text)


def _models(request: argparse.Namespace) -> tuple[int, Any]:
    from design_models import CATALOGUE

    from .reports import catalogue_table

    console().print(catalogue_table())
    record = [
        {
            "name": entry.name,
            "title": entry.title,
            "design_model": entry.assumption,
            "policy": type(entry.policy).__name__.lower(),
            "paths": list(entry.paths),
            "paper": entry.paper,
            "note": entry.note,
        }
        for entry in CATALOGUE.values()
    ]
    return HELD, record


def _verify(request: argparse.Namespace) -> tuple[int, Any]:
    from design_models import CATALOGUE, ModelError

    from .reports import print_outcome
    from .user_files import load_subject, load_update
    from .verification import verify_subject

    names = list(dict.fromkeys(request.subjects)) or list(CATALOGUE)
    subjects = [load_subject(name) for name in names]
    update = None if request.update is None else load_update(request.update)
    if update is not None and len(subjects) != 1:
        raise ModelError("`--update` checks one model; name one, as in my_memory.py:model.")
    if len(subjects) > 1 and all(name in CATALOGUE for name in names):
        outcomes = _verify_side_by_side(names, request.seed)
    else:
        screen, outcomes = console(), []
        for subject in subjects:
            with Status(f"verifying {subject.name}") as status, _naming(subject.name, names):
                outcome, certificate = verify_subject(
                    subject, seed=request.seed, progress=status.stage
                )
            outcomes.append(outcome)
            print_outcome(screen, outcome)
            if update is not None and certificate is not None:
                outcomes[-1] = _check_update(request, certificate, outcome, update)
    code = HELD if all(outcome.holds for outcome in outcomes) else FAILED
    records = [outcome.record for outcome in outcomes]
    return code, records[0] if len(names) == 1 else records


def _check_update(request: argparse.Namespace, certificate: Any, outcome: Any, update: Any) -> Any:
    from dataclasses import asdict

    from inference.update_check import check_update

    from .reports import print_update
    from .verification import Outcome

    with Status(f"checking {request.update}"):
        verdict = check_update(certificate.exact_filter, update, seed=request.seed)
    compared = f"the exact filter of {outcome.name}"
    policy = outcome.record["policy"]["name"]
    if policy != "exact":
        compared = (
            f"the exact filter of the design model of {outcome.name}, not with {outcome.name} "
            f"itself, which is its reduction by {policy}"
        )
    print_update(console(), request.update, verdict, compared)
    record = outcome.record | {
        "holds": outcome.holds and verdict.exact,
        "update_check": {
            "function": request.update,
            "compared_with": compared,
            **asdict(verdict),
            "words": verdict.words,
        },
    }
    return Outcome(outcome.name, record)


def _verify_side_by_side(names: Sequence[str], seed: int) -> list[Any]:
    from rich.live import Live

    from .reports import print_outcome, summary_table
    from .verification import verify_catalogue

    screen, outcomes = console(), []
    stages = dict.fromkeys(names, "waiting")
    with Live(console=screen, refresh_per_second=4, transient=True) as live:

        def report(name: str, stage: str) -> None:
            stages[name] = stage
            if screen.is_terminal:
                live.update(summary_table(outcomes, stages))

        for outcome in verify_catalogue(names, seed=seed, report=report):
            outcomes.append(outcome)
            report(outcome.name, "done")
    outcomes.sort(key=lambda outcome: names.index(outcome.name))
    screen.print(summary_table(outcomes, {}))
    for outcome in outcomes:
        if not outcome.holds:
            print_outcome(screen, outcome)
    held = sum(outcome.holds for outcome in outcomes)
    screen.print(f"{held} of {len(outcomes)} verified")
    return outcomes


def _new(request: argparse.Namespace) -> tuple[int, Any]:
    from .new_model import write_new_model

    write_new_model(request.file)
    name = shlex.quote(str(request.file))
    print(f"wrote {request.file}; verify it: mbd verify {name}:model")
    return HELD, {"file": str(request.file)}


def _recall(request: argparse.Namespace) -> tuple[int, Any]:
    from dataclasses import asdict

    from .mqar import read_batch, shipped_batch
    from .records import record
    from .reports import recall_table
    from .untrained import NOISE_RATIO, run

    start = time.perf_counter()
    path = request.file or shipped_batch()
    batch = read_batch(path)
    with Status(f"recalling {path.name}") as status:
        scores = run(batch, request.widths, seed=request.seed, progress=status.stage)
    rows, writes = batch.keys.shape
    print(
        f"{path.name}: {rows} rows, {writes} writes and {batch.queries.shape[1]} queries each, "
        f"{len(batch.candidates)} candidate values"
    )
    console().print(recall_table(scores))
    config = {
        "file": path.name,
        "rows": rows,
        "writes": writes,
        "queries": batch.queries.shape[1],
        "candidates": len(batch.candidates),
        "widths": request.widths,
        "noise_ratio": NOISE_RATIO,
    }
    words = [] if request.file is None else [str(request.file)]
    words += ["--widths", *map(str, request.widths), "--seed", str(request.seed)]
    return HELD, record(
        config,
        [asdict(score) for score in scores],
        command=shlex.join(["mbd", "recall", *words]),
        seed=request.seed,
        seconds=time.perf_counter() - start,
    )


def _batch(request: argparse.Namespace) -> tuple[int, Any]:
    from design_models import ModelError

    from .mqar import UNLABELLED
    from .tasks.catalogue import TASKS, draw, write_batch

    task = TASKS[request.task]
    batch = draw(
        chosen_rows(task, request),
        request.examples,
        request.seed,
        training=request.training,
        filler_seed=request.filler_seed,
    )
    try:
        write_batch(request.out, batch)
    except OSError as error:
        message = f"`--out` is {request.out}: {error.strerror}; name another file."
        raise ModelError(message) from error
    asked = int((batch.labels[0] != UNLABELLED).sum())
    shape = " x ".join(map(str, batch.inputs.shape))
    print(f"wrote {request.out}: inputs {shape}, {asked} labels in the first row")
    return HELD, {"task": task.name, **batch.config}


def _bench(request: argparse.Namespace) -> tuple[int, Any]:
    import jax

    from design_models import ModelError

    from . import bench
    from .records import record
    from .reports import bench_table

    known = sorted({comparison.name for comparison in bench.COMPARISONS})
    unknown = [name for name in request.names if name not in known]
    if unknown:
        raise ModelError(f"there is no comparison {unknown[0]!r}; known: {', '.join(known)}.")
    start = time.perf_counter()
    with jax.enable_x64(False), Status("timing") as status:
        timings = bench.run(request.names, seed=request.seed, progress=status.stage)
    console().print(bench_table(timings))
    return HELD, record(
        {"names": request.names, "repeats": bench.REPEATS},
        bench.as_records(timings),
        command=shlex.join(["mbd", "bench", *request.names, "--seed", str(request.seed)]),
        seed=request.seed,
        seconds=time.perf_counter() - start,
    )


if __name__ == "__main__":
    sys.exit(main())
