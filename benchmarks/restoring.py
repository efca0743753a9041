"""Does restoring the covariance help a trained Gated DeltaNet to find what it read long ago?

A teacher is trained on text; Bayesian Layers are distilled into it, and a control goes on training
without; all are asked for needles in rows up to several times as long as any in training.

    python -m benchmarks.restoring --text books.txt --valid other.txt --out runs/restoring

The same again goes on where it was stopped (`--minutes`). OUT/summary.json holds all that is known.
Arms can be distilled side by side, a GPU each, into one folder, once the teacher is there:

    python -m benchmarks.restoring ... --out runs/restoring --arms       # the teacher alone, on all
    CUDA_VISIBLE_DEVICES=1 python -m benchmarks.restoring ... --out runs/restoring --arms student

and the same without `--arms` then puts them together.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recall.checkpoints.folder import read_checkpoint
from recall.language.distillation import Distillation, distill
from recall.language.inside import inside
from recall.language.pretraining import Pretraining, Sizes, pretrain
from recall.language.run_files import RunFiles
from recall.language.scores import retrieval_scorer
from recall.language.training import mesh_of
from recall.language_options import absolute, add_text_options, devices_of, mixture_of
from recall.option_types import amount
from recall.records import record, write_json
from recall.ruler.scores import interval
from recall.seeds import over_seeds
from recall.text.corpus import asked_rows
from recall.text.documents import read_documents
from recall.text.needles import FORMS, sources_of
from recall.text.vocabulary import end_token, read_vocabulary
from recall.time_limit import deadline_of

ARMS: dict[str, dict[str, Any]] = {
    "control": {"control": True},
    "student": {},
    "exact": {"restoration": 1.0, "learned": False},
}
"""What each arm is beside what is asked for; there is a student for every λ that it begins with."""

_FORMS = (
    "single, noise",
    "single, prose",
    "single, prose, uuids",
    "multikey, prose",
    "multikey, needles",
    "multivalue, prose",
)

_INSIDE = "restoration", "decay", "drift", "strength", "gain"
"""What is kept of each restored layer in the longest rows, a number a head."""


def main() -> None:
    request = _parser().parse_args()
    request.cache = str((request.cache or request.out / "tokens").resolve())
    began = time.perf_counter()
    deadline = deadline_of(request)
    jax.config.update("jax_compilation_cache_dir", str((request.out / "programs").resolve()))
    known = _Known(request, began)
    teacher = _teacher(request, deadline)
    if teacher is None:
        return _stopped("the teacher")
    best: dict[str, float] = {}
    for seed in request.seeds:
        for arm, own in _arms(request).items():
            for rate in [best[arm]] if arm in best else request.rates:
                if time.perf_counter() > deadline:
                    return _stopped("the distillations")
                name = f"{arm}-{rate:g}-{seed}"
                plan = replace(_distillation(request, rate, seed), **own)
                found = _finished(request, name, distill, plan, deadline)
                files = RunFiles(request.out / name)
                if found is None:
                    return _stopped(name)
                known.add(name, found, files, arm, rate, seed)
            best.setdefault(arm, known.best_rate(arm, seed))
    known.add("teacher", teacher, RunFiles(request.out / "teacher"))
    known.conclude(best)
    print(f"summary: {known.file}")


def _stopped(what: str) -> None:
    print(f"stopped at {what}; the same again goes on")


def _teacher(request: argparse.Namespace, deadline: float) -> dict[str, Any] | None:
    plan = Pretraining(
        absolute(request.text),
        absolute(request.valid),
        request.cache,
        Sizes(
            request.vocabulary,
            request.d_model,
            request.depth,
            request.heads,
            request.key_width,
            request.value_width,
        ),
        mixture_of(request),
        batch=request.batch,
        tokens=request.tokens,
        rate=request.teacher_rate,
        answers=request.answers,
        compute="float32" if request.float32 else "bfloat16",
    )
    return _finished(request, "teacher", pretrain, plan, deadline)


def _arms(request: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By name, what each arm does otherwise."""
    students = {f"student-{dial:g}": {"restoration": dial} for dial in request.restoration}
    found: dict[str, dict[str, Any]] = {}
    for arm in request.arms:
        found |= students if arm == "student" else {arm: ARMS[arm]}
    return found


def _distillation(request: argparse.Namespace, rate: float, seed: int) -> Distillation:
    return Distillation(
        str((request.out / "teacher" / "model").resolve()),
        absolute(request.text),
        absolute(request.valid),
        request.cache,
        layers=None if request.layers is None else tuple(request.layers),
        matching=request.matching,
        steps=request.steps,
        task=request.task,
        answers=request.answers,
        batch=request.distill_batch,
        rate=rate,
        mixture=mixture_of(request),
        seed=1000 + seed,
        compute="float32" if request.float32 else "bfloat16",
        lean=request.lean,
    )


def _finished(
    request: argparse.Namespace,
    name: str,
    work: Callable[..., dict[str, Any] | None],
    plan: Pretraining | Distillation,
    deadline: float,
) -> dict[str, Any] | None:
    """The record of a run, begun or gone on with where it is not finished."""
    files = RunFiles(request.out / name)
    if files.record_file.is_file():
        return files.record()
    if not files.plan_file.is_file():
        files.create_folder(asdict(plan))
    return work(
        files.path,
        plan,
        devices=devices_of(request, plan.batch),
        show=_show(name),
        stage=_stage(name),
        command=_command(request),
        deadline=deadline,
    )


class _Known:
    """What is known so far, on disk after every run."""

    def __init__(self, request: argparse.Namespace, began: float) -> None:
        self.request, self.began = request, began
        self.file = request.out / "summary.json"
        self.runs: dict[str, dict[str, Any]] = {}
        self.results: dict[str, Any] = {}
        self.asked: dict[str, dict[int, np.ndarray]] = {}

    def add(
        self,
        name: str,
        found: Mapping[str, Any],
        files: RunFiles,
        arm: str = "teacher",
        rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Add a finished run, with what it finds in long rows; from its folder where that knows."""
        kept = files.path / "retrieval.json"
        if not kept.is_file():
            write_json(kept, self._retrieval(name, files))
        told = json.loads(kept.read_text(encoding="utf-8"))
        metrics = {key: part for key, part in found["metrics"].items() if key != "curve"}
        for when in ("before", "after"):
            if when in metrics:
                metrics[when] = {k: part for k, part in metrics[when].items() if k != "inside"}
        self.runs[name] = {
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "metrics": metrics,
            "retrieval": told["retrieval"],
            "inside_longest": {
                layer: {number: _rounded(heads[number]) for number in _INSIDE}
                for layer, heads in told["inside_longest"].items()
            },
            **{key: found[key] for key in ("device", "commit")},
        }
        self.write()
        cells = "  ".join(
            f"{form} {[round(part['found'], 3) for part in by_length.values()]}"
            for form, by_length in told["retrieval"].items()
        )
        print(f"{name}: {cells}", flush=True)

    def best_rate(self, arm: str, seed: int) -> float:
        """The rate of least held-out loss, over prose and needles alike."""
        tried = [run for run in self.runs.values() if run["arm"] == arm and run["seed"] == seed]

        def loss(run: Mapping[str, Any]) -> float:
            return _tested(run)["loss"] + 1 - _tested(run)["retrieved"]

        return min(tried, key=loss)["rate"]

    def conclude(self, best: Mapping[str, float]) -> None:
        """Each arm at its best rate, and what it gains on the control, seed by seed."""
        arms = {
            arm: [
                run for run in self.runs.values() if run["arm"] == arm and run["rate"] == best[arm]
            ]
            for arm in best
        }
        arms["teacher"] = [self.runs["teacher"]]
        self.results = {
            "rates": dict(best),
            "perplexity": {
                arm: _over_seeds([_tested(run)["perplexity"] for run in runs])
                for arm, runs in arms.items()
            },
            "device_seconds": {
                arm: _over_seeds([run["metrics"]["device_seconds"] for run in runs])
                for arm, runs in arms.items()
            },
            "retrieval": {
                arm: self._cells(lambda cell, runs=runs: _over_seeds(cell(runs)))
                for arm, runs in arms.items()
            },
        }
        if "control" in arms:
            self.results["gain_on_control"] = {
                arm: self._cells(
                    lambda cell, runs=runs: _over_seeds(
                        (np.asarray(cell(runs)) - np.asarray(cell(arms["control"]))).tolist()
                    )
                )
                for arm, runs in arms.items()
                if arm not in ("control", "teacher")
            }
        self.write()
        _plot(self.request.out / "retrieval.png", self.results["retrieval"])

    def _cells(self, of_cell: Any) -> dict[str, dict[str, Any]]:
        def cell(form: str, length: int) -> Any:
            return of_cell(
                lambda runs: [run["retrieval"][form][str(length)]["found"] for run in runs]
            )

        return {
            form: {str(length): cell(form, length) for length in self.request.ask_lengths}
            for form in self.request.forms
        }

    def write(self) -> None:
        places = ("out", "cache")
        config = {key: str(part) for key, part in vars(self.request).items() if key not in places}
        write_json(
            self.file,
            record(
                config,
                {"results": self.results, "runs": self.runs},
                command=_command(self.request),
                seed=list(self.request.seeds),
                seconds=time.perf_counter() - self.began,
            ),
        )

    def _retrieval(self, name: str, files: RunFiles) -> dict[str, Any]:
        request, model = self.request, read_checkpoint(files.model).model
        tokenizer = read_vocabulary(files.model / "tokenizer.json")
        if not self.asked:
            _stage(name)("making rows to ask")
            sources = sources_of(read_documents(request.valid or request.text))
            self.asked = {
                form: {
                    length: asked_rows(tokenizer, sources, FORMS[form], length, request.ask_rows, 0)
                    for length in request.ask_lengths
                }
                for form in request.forms
            }
        end, compute = end_token(tokenizer), "float32" if request.float32 else "bfloat16"
        score = retrieval_scorer(end, mesh_of(request.devices or len(jax.devices())), compute)
        found: dict[str, dict[str, Any]] = {}
        for length in request.ask_lengths:
            _stage(name)(f"asking in rows of {length}")
            for form in request.forms:
                right = score(model, self.asked[form][length])
                low, high = interval(float(right.mean()), len(right))
                found.setdefault(form, {})[str(length)] = {
                    "found": float(right.mean()),
                    "low": low,
                    "high": high,
                    "rows": len(right),
                }
        longest = max(request.ask_lengths)
        looked = self.asked[request.forms[0]][longest][:4]
        return {"retrieval": found, "inside_longest": inside(model, looked, end, compute)}


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]


def _tested(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Held-out scores of the finished model."""
    return run["metrics"].get("after") or run["metrics"]["held_out"]


def _plot(path: Path, retrieval: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Needles found over length, a panel a form, a line an arm with its interval over seeds."""
    from matplotlib.figure import Figure

    asked = next(iter(retrieval.values()))
    forms, lengths = list(asked), [int(length) for length in next(iter(asked.values()))]
    rows = -(-len(forms) // 3)
    figure = Figure(figsize=(12, 0.8 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).ravel()
    for form, axis in zip(forms, axes, strict=False):
        for arm, cells in retrieval.items():
            means = np.array([cell["mean"] for cell in cells[form].values()])
            halves = np.nan_to_num([cell["half_width"] for cell in cells[form].values()])
            style = {"color": "black", "linestyle": ":"} if arm == "teacher" else {}
            axis.errorbar(lengths, means, halves, label=arm, marker="o", capsize=3, **style)
        axis.set(title=form, ylim=(-0.02, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    for axis in axes[len(forms) :]:
        axis.remove()
    figure.supxlabel("tokens of a row")
    figure.supylabel("needles found")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the half width of its 95 % interval over seeds."""
    mean, half = over_seeds(values)
    return {"mean": mean, "half_width": half, "seeds": list(values)}


def _show(name: str):
    last = [0.0]

    def show(step: int, steps: int, words: str) -> None:
        if time.perf_counter() - last[0] > 10 or step + 1 == steps:
            last[0] = time.perf_counter()
            print(f"{name}: step {step + 1} of {steps}  {words}", flush=True)

    return show


def _stage(name: str):
    return lambda what: print(f"{name}: {what}", flush=True)


def _command(request: argparse.Namespace) -> str:
    import shlex
    import sys

    return shlex.join(["python", "-m", "benchmarks.restoring", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    add_text_options(parser)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=amount, default=value)
    parser.add_argument("--batch", type=amount, default=64, help="rows of the teacher's steps")
    parser.add_argument("--tokens", type=amount, default=200_000_000, help="for the teacher")
    parser.add_argument("--teacher-rate", type=float, default=2e-3)
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4e-4])
    parser.add_argument("--layers", type=int, nargs="+", help="to restore (default: all)")
    parser.add_argument(
        "--restoration",
        type=float,
        nargs="+",
        default=[0.9],
        help="λ that students begin with, one student for each",
    )
    parser.add_argument("--matching", type=int, default=100)
    parser.add_argument("--steps", type=amount, default=400)
    parser.add_argument("--task", type=float, default=0.5)
    parser.add_argument("--distill-batch", type=amount, default=32)
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=list(_FORMS))
    parser.add_argument("--ask-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ask-rows", type=amount, default=200)
    return parser


if __name__ == "__main__":
    main()
