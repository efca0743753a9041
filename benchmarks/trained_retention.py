"""Does the theory of retrieval hold in layers that were trained? Predicted against measured.

    python -m benchmarks.trained_retention

Each layer is trained on associative recall of pairs of vectors for a minute or two on two cores;
its heads' decay, drift, noise, and effective width are read off; and the retention of the first
pair after N more, up to many more than training showed, is set beside three predictions
(`recall.trained`). Each layer is trained as published, with short convolutions that let a key and a
value see three pairs before their own, and without these, where a write is one pair's.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recall.courses import Course, Segment
from recall.layers_by_name import mixer_maker, unconvolved
from recall.plans import Plan
from recall.records import keeper
from recall.tasks.associative import AssociativeRecall, draw
from recall.trained import Carried, carried, effective, written
from recall.training import start, train

PAST = 4
"""Pairs after which a short convolution no longer reaches the first."""

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
    return {
        f"{layer}{'' if convolved else ', no convolution'}": one(layer, config, convolved)
        for convolved in (True, False)
        for layer in config.layers
    }


def one(layer: str, config: Config, convolved: bool) -> dict[str, Any]:
    """Of one layer: accuracy at the end of training, and every head after it."""
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
    make = mixer_maker(layer, config.heads)
    runs = start(plan, make if convolved else lambda width, rng: unconvolved(make(width, rng)))
    told: list[float] = []
    runs = train(
        plan, runs, 0, config.steps, lambda step, loss, right, tokens: told.append(right[0])
    )
    asked, _ = draw(AssociativeRecall(pairs=max(config.more) + 1), config.rows, 10**6)
    found = {"training_accuracy": float(np.mean(told[-50:]))}
    mixer, given = written(runs.first, asked, max(config.more) + 1)
    found["heads"] = [
        {"effective": asdict(settings), "retention": asdict(curve)} | shares(curve)
        for settings, curve in zip(
            effective(mixer, given), carried(mixer, given, config.more), strict=True
        )
    ]
    print(layer, convolved, found["training_accuracy"], [head["kept"] for head in found["heads"]])
    return found


def shares(curve: Carried) -> dict[str, Any]:
    """What is left after 15 and after 64 more of what was left after 4, past any convolution."""
    names = ("measured", "from_width", "from_effective_width", "from_keys")
    place = {count: number for number, count in enumerate(curve.more)}
    kept = {
        f"from {PAST} to {count}": {
            name: getattr(curve, name)[place[count]] / getattr(curve, name)[place[PAST]]
            for name in names
        }
        for count in (15, 64)
    }
    return {"kept": kept}


def main() -> None:
    """Write results/retrieval_trained.json."""
    config = Config()
    keep = keeper(
        RESULTS / "retrieval_trained.json",
        asdict(config),
        command="python -m benchmarks.trained_retention",
        seed=config.seed,
    )
    keep(run(config))


if __name__ == "__main__":
    main()
