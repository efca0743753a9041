"""The tasks by name: what their rows are, and how they are drawn."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from design_models import ModelError

from . import associative, mad, zoology
from .associative import AssociativeRecall
from .mad import FuzzyRecall, InContextRecall, SelectiveCopy
from .zoology import Zoology

Rows = Zoology | InContextRecall | FuzzyRecall | SelectiveCopy | AssociativeRecall
"""What decides the law of a task's rows."""


@dataclass(frozen=True)
class Task:
    """A recall task.

    Args:
        name: as on the command line.
        does: one sentence.
        rows: what its rows are where nothing else is asked for.
    """

    name: str
    does: str
    rows: Rows


_ALL = (
    Task("mqar", "Zoology's multi-query associative recall, bit for bit", Zoology()),
    Task(
        "mqar_overwrite",
        "multi-query recall of the value last written, some keys being written twice",
        Zoology(length=128, pairs=16, overwrites=4),
    ),
    Task("associative_recall", "recall of continuous keys and values", AssociativeRecall()),
    Task(
        "collision",
        "the same with keys that overlap, some of them revised",
        AssociativeRecall(overlap=0.5, revisions=2),
    ),
    Task("in_context_recall", "MAD: a key that comes again asks for its value", InContextRecall()),
    Task("noisy_recall", "MAD: the same among tokens of noise", InContextRecall(32, 128, 16, 0.2)),
    Task("fuzzy_recall", "MAD: keys and values are motifs of several tokens", FuzzyRecall()),
    Task("selective_copy", "MAD: tokens among blanks, copied in order", SelectiveCopy()),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


@dataclass(frozen=True)
class Batch:
    """Rows of a task.

    Args:
        inputs: tokens (row, position), or numbers of (key, value) in the last axis.
        labels: what is asked at each position, -100 where nothing is.
        config: what was drawn, and from which seed.
    """

    inputs: np.ndarray
    labels: np.ndarray
    config: dict[str, Any] = field(default_factory=dict)


def draw(
    rows: Rows, examples: int, seed: int, *, training: bool = False, filler_seed: int | None = None
) -> Batch:
    """Draw a batch.

    Args:
        rows: their law.
        examples: how many.
        seed: of the draws.
        training: MAD's tasks label every position in training, and only what a row decides in
            tests.
        filler_seed: `Zoology` only: of random tokens where nothing else stands.

    Raises:
        ModelError: the rows have no filler.
    """
    if training and not isinstance(rows, InContextRecall | FuzzyRecall):
        raise ModelError("`training` is for MAD's recall tasks; others ask the same in both.")
    config: dict[str, Any] = {"num_examples": examples, "seed": seed}
    if isinstance(rows, Zoology):
        inputs, labels = zoology.draw(rows, examples, seed, filler_seed)
        filler = {"random_non_queries": filler_seed is not None, "torch_seed": filler_seed}
        return Batch(inputs, labels, config | rows.config | filler)
    if filler_seed is not None:
        raise ModelError("`filler_seed` is for mqar and mqar_overwrite; this task has no filler.")
    config |= asdict(rows)
    if isinstance(rows, AssociativeRecall):
        return Batch(*associative.draw(rows, examples, seed), config)
    return Batch(
        *mad.draw(rows, examples, seed, training=training), config | {"training": training}
    )


def write_batch(path: Path, batch: Batch) -> None:
    """Write `inputs`, `labels` and `config` (as JSON) to a .npz file.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:  # a name without .npz is kept as it is
        np.savez_compressed(
            file, inputs=batch.inputs, labels=batch.labels, config=json.dumps(batch.config)
        )
