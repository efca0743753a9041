"""A training run from its plan to its record: train, save on the way, test, plot."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from layers.mixer import parameter_count

from . import plots
from .courses import held_out
from .disturbances import disturbed
from .evaluation import evaluate
from .layers_by_name import mixer_of
from .meshes import gathered, placed
from .models import PairEmbedding, RecallModel
from .plans import Plan, as_data, harder
from .processes import of_first_process
from .records import record, write_json
from .run_folder import RunFolder
from .seeds import best_rate
from .tasks.associative import AssociativeRecall
from .tasks.catalogue import Rows
from .training import start, train

VALIDATION_SEED, TEST_SEED = 2**31, 2**31 + 10**6
"""First seeds of held-out rows; seeds of training lie below."""

_SECONDS_BETWEEN_SAVES = 30.0
_SMOOTHED = 50

Report = Callable[[int, int, float, float, float], None]
"""(step, steps in all, loss, accuracy, tokens a second), of the best run."""
Stage = Callable[[str], None]


def finish(
    folder: RunFolder,
    *,
    mesh: Mesh | None = None,
    report: Report = lambda *told: None,
    stage: Stage = lambda name: None,
    command: str = "",
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Train a run to its end, from its last checkpoint on, and write its record and plots.

    Args:
        folder: of the run, with its plan.
        mesh: of devices that share the run; one device where left out.
        report: called after each step.
        stage: called as testing begins.
        command: that makes the record again.
        deadline: `time.perf_counter()` at which training stops with a checkpoint.

    Returns:
        The record; None where the deadline came first.
    """
    plan, began = folder.plan(), time.perf_counter()
    runs, first, history = folder.load(start(plan, mixer_of(plan)))
    runs, writes = placed(runs, mesh), jax.process_index() == 0
    # Of every step, those of every run; of every piece of training, seconds in all, and tokens and
    # seconds of its steps but the first.
    history = {"loss": [], "accuracy": [], "pieces": []} | history
    pieces = history["pieces"]
    pieces.append([0.0, 0, 0.0])
    saved = time.perf_counter()
    spent = _Meter()

    def after(step: int, loss: np.ndarray, accuracy: np.ndarray, tokens: int) -> None:
        history["loss"].append(loss.tolist())
        history["accuracy"].append(accuracy.tolist())
        best = int(np.argmin(loss))
        speed = spent.count(tokens * len(plan.runs))
        report(step, plan.course.length, float(loss[best]), float(accuracy[best]), speed)

    step = first
    while step < plan.course.length:
        if of_first_process(time.perf_counter() > deadline):
            return None
        ahead = min(plan.course.length, step + _SMOOTHED)
        runs = train(plan, runs, step, ahead, after, mesh)
        step = ahead
        now = time.perf_counter()
        due = now - saved > _SECONDS_BETWEEN_SAVES or now > deadline
        if of_first_process(due) or step == plan.course.length:
            pieces[-1] = [now - began, spent.tokens, spent.seconds]
            folder.save(runs, step, history)
            saved = time.perf_counter()
    _, tokens, timed = np.sum(pieces, axis=0)
    stage("testing")
    runs = gathered(runs, mesh)
    metrics = {
        "runs": [{"rate": rate, "seed": seed} for rate, seed in plan.runs],
        "parameters": parameter_count(runs.first),
        "validation": _scores(runs.models, plan, _seeds(VALIDATION_SEED, plan)),
        "test": _scores(runs.models, plan, _test_seeds(plan)),
        "tokens_per_second": tokens / timed if timed else 0.0,
        "final_loss": np.mean(history["loss"][-_SMOOTHED:], axis=0),
    }
    seconds = sum(piece[0] for piece in pieces[:-1]) + time.perf_counter() - began
    if mesh is not None:
        metrics["mesh"] = dict(mesh.shape)
    found = record(as_data(plan), metrics, command=command, seed=list(plan.seeds), seconds=seconds)
    if not writes:
        return found
    write_json(folder.record_file, found)
    plots.learning_curve(folder.path / "learning_curve.png", plan, history)
    plots.accuracy_by_load(folder.path / "accuracy_by_load.png", plan, metrics["test"])
    return found


def beyond(
    folder: RunFolder,
    examples: int,
    harder_too: bool,
    stage: Stage = lambda name: None,
    command: str = "",
) -> dict[str, Any]:
    """Scores of a trained run on rows as in training, and past what it showed or disturbed.

    Args:
        folder: of the run.
        examples: rows of each kind.
        harder_too: whether rows past training are asked for.
        stage: called as each kind begins.
        command: that makes the record again.

    Returns:
        A record of every run's scores by name of the rows, and the rate that validation chose.
    """
    plan, began, trained = folder.plan(), time.perf_counter(), folder.record()
    runs, step, _ = folder.load(start(plan, mixer_of(plan)))
    hardest = plan.course.segments[-1].rows
    width = runs.models.norm.shape[0] // plan.heads
    cases = {"as in training": (runs.models, hardest)}
    if harder_too:
        for name, rows in harder(hardest, width).items():
            cases[name] = _that_see(runs.models, rows), rows
        for name, models in disturbed(runs.models, len(plan.runs), hardest).items():
            cases[name] = models, hardest
    if trained is None:
        stage("validation")
        validation = _scores(runs.models, plan, _seeds(VALIDATION_SEED, plan))
    else:
        validation = trained["metrics"]["validation"]
    found = {}
    for name, (models, rows) in cases.items():
        stage(name)
        asked = held_out(rows, examples, TEST_SEED, plan.course.filler)
        found[name] = [asdict(score) for score in evaluate(models, asked)]
    metrics = {"step": step, "rate": best_rate(plan, validation), "scores": found}
    seconds = time.perf_counter() - began
    config = as_data(plan) | {"examples": examples}
    return record(config, metrics, command=command, seed=list(plan.seeds), seconds=seconds)


def _that_see(models: RecallModel, rows: Rows) -> RecallModel:
    """The same models of keys that overlap as the rows say."""
    embedding = models.embedding
    if isinstance(embedding, PairEmbedding) and isinstance(rows, AssociativeRecall):
        return replace(models, embedding=replace(embedding, overlap=rows.overlap))
    return models


def _test_seeds(plan: Plan) -> list[int]:
    """The published ones for a published course."""
    if plan.course.epochs:
        return plan.course.test_seeds(len(plan.tests))
    return _seeds(TEST_SEED, plan)


def _seeds(first: int, plan: Plan) -> list[int]:
    return [first + 2 * place for place in range(len(plan.tests))]


def _scores(models: RecallModel, plan: Plan, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for (name, rows), seed in zip(plan.tests.items(), seeds, strict=True):
        asked = held_out(rows, plan.test_examples, seed, plan.course.filler)
        found[name] = [asdict(score) for score in evaluate(models, asked)]
    return found


class _Meter:
    """Tokens a second, without the first step, which compiles."""

    def __init__(self) -> None:
        self.tokens, self.began, self.seconds = 0, 0.0, 0.0

    def count(self, tokens: int) -> float:
        if not self.began:
            self.began = time.perf_counter()
        else:
            self.tokens += tokens
            self.seconds = time.perf_counter() - self.began
        return self.tokens / max(self.seconds, 1e-9)
