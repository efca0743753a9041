"""Does the theory of retrieval hold in layers that were trained? Predicted against measured.

    python -m benchmarks.trained_retention

Each layer is trained on associative recall of pairs of vectors for a minute or two on two cores;
its heads' decay, drift, noise, and effective width are read off; and the retention of the first
pair after N more, up to many more than training showed, is set beside three predictions
(`recall.trained`).
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from recall.courses import Course, Segment
from recall.layers_by_name import mixer_maker
from recall.plans import Plan
from recall.records import record, write_json
from recall.tasks.associative import AssociativeRecall, draw
from recall.trained import carried, effective, written
from recall.training import start, train

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Config:
    """What is trained, and what is asked of it afterwards."""

    layers: tuple[str, ...] = ("bayesian_layer", "bayesian_static", "gated_deltanet", "deltanet")
    d_model: int = 32
    heads: int = 2
    pairs: int = 16
    steps: int = 600
    batch: int = 64
    rate: float = 1e-2
    more: tuple[int, ...] = (0, 1, 2, 4, 8, 15, 32, 64, 127)
    rows: int = 256
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """Train every layer, and compare."""
    return {layer: one(layer, config) for layer in config.layers}


def one(layer: str, config: Config) -> dict[str, Any]:
    """Of one layer: accuracy at the end of training, and every head before and after it."""
    rows = AssociativeRecall(pairs=config.pairs)
    course = Course((Segment(rows, 0),), config.batch, steps=config.steps, seed=config.seed)
    plan = Plan(
        "associative_recall",
        layer,
        course,
        {},
        0,
        d_model=config.d_model,
        heads=config.heads,
        rates=(config.rate,),
        seeds=(config.seed,),
    )
    runs = start(plan, mixer_maker(layer, config.heads))
    untrained = _first(runs.models)
    told: list[float] = []
    runs = train(
        plan, runs, 0, config.steps, lambda step, loss, right, tokens: told.append(right[0])
    )
    asked, _ = draw(AssociativeRecall(pairs=max(config.more) + 1), config.rows, 10**6)
    found = {"training_accuracy": float(np.mean(told[-50:]))}
    for name, model in (("untrained", untrained), ("trained", _first(runs.models))):
        mixer, given = written(model, asked, max(config.more) + 1)
        found[name] = [
            {"effective": asdict(settings), "retention": asdict(curve)}
            for settings, curve in zip(
                effective(mixer, given), carried(mixer, given, config.more), strict=True
            )
        ]
    print(layer, found["training_accuracy"])
    return found


def _first(models: Any) -> Any:
    arrays, rest = eqx.partition(models, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf[0], arrays), rest)


def main() -> None:
    """Write results/retrieval_trained.json."""
    config, start_time = Config(), time.perf_counter()
    metrics = run(config)
    found = record(
        asdict(config),
        metrics,
        command="python -m benchmarks.trained_retention",
        seed=config.seed,
        seconds=time.perf_counter() - start_time,
    )
    write_json(RESULTS / "retrieval_trained.json", found)


if __name__ == "__main__":
    main()
