"""What a training run is: task, layer, course, optimiser; and the plans one asks for by name."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from design_models import ModelError

from .courses import Course, Segment
from .tasks.associative import AssociativeRecall
from .tasks.catalogue import Rows, Task
from .tasks.mad import FuzzyRecall, InContextRecall, SelectiveCopy
from .tasks.zoology import Zoology

PRESETS = ("small", "zoology")
ZOOLOGY_SEED, ZOOLOGY_EPOCHS = 123, 32
ZOOLOGY_RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
SMALL_RATE, SMALL_STEPS = 1e-2, 600
_KINDS = {
    kind.__name__: kind
    for kind in (Zoology, InContextRecall, FuzzyRecall, SelectiveCopy, AssociativeRecall)
}


@dataclass(frozen=True)
class Plan:
    """A training run, or several that differ in rate and seed only and run side by side.

    Args:
        task: its name.
        layer: a name of the catalogue, "attention", FILE.py:OBJECT, or
            FILE.py:OBJECT:WIDE.
        course: what is shown.
        tests: rows that accuracy is measured on, by name.
        test_examples: how many of each.
        d_model: width of the sequence (for pairs of vectors, of one vector).
        heads: memories side by side.
        rates: learning rates.
        seeds: of parameters; every rate is run with every seed.
        weight_decay: AdamW's.
        dropout: of embedded tokens.
        as_zoology: whether mixers are as in Zoology's sweep: without an output gate, and Gated
            DeltaNet with values twice as wide as keys.
        expansion: how many times as wide as keys values are; as published where None.
    """

    task: str
    layer: str
    course: Course
    tests: Mapping[str, Rows]
    test_examples: int
    d_model: int = 64
    heads: int = 2
    rates: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)
    weight_decay: float = 0.1
    dropout: float = 0.0
    as_zoology: bool = False
    expansion: int | None = None

    @property
    def runs(self) -> list[tuple[float, int]]:
        """(rate, seed) of every run."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds]


def small_rows(task: Task) -> Rows:
    """The task's rows, or shorter ones that are learned in minutes."""
    match task.rows:
        case Zoology():
            return replace(task.rows, vocabulary=512, length=64, pairs=8)
        case SelectiveCopy():
            return replace(task.rows, length=64, copied=8)
        case _:
            return task.rows


def small_batch(rows: Rows) -> int:
    """How many rows a step shows: 64, or fewer that hold 4,096 positions together."""
    return max(1, min(64, 4096 // rows.length))


def small_plan(task: str, layer: str, rows: Rows, *, batch: int, steps: int) -> Plan:
    """Train on rows drawn on the fly, at the load asked for and at half of it."""
    lighter = _half_the_pairs(rows)
    segments = tuple(Segment(law, 0) for law in dict.fromkeys((lighter, rows)))
    course = Course(segments, batch, steps=steps)
    loads = {_load_name(law): law for law in (lighter, rows)}
    return Plan(task, layer, course, loads, test_examples=256, rates=(SMALL_RATE,))


def zoology_plan(task: str, layer: str, epochs: int = ZOOLOGY_EPOCHS) -> Plan:
    """The published protocol: 180,000 examples in five segments, 32 times in the same order.

    Every rate of the published grid is run. Four things differ from upstream: a run does not stop
    early where its accuracy passes 0.99, the rate is chosen on other rows than those that accuracy
    is reported on, keys, queries and values are not rounded to bfloat16, and fillers come from a
    seed of their own.

    Args:
        task: its name.
        layer: as in `Plan`.
        epochs: how often the segments are shown; 32 as published.

    Raises:
        ModelError: the task is not Zoology's.
    """
    if task not in ("mqar", "mqar_overwrite"):
        raise ModelError(
            f"`--preset zoology` is the protocol of mqar and mqar_overwrite, not {task}."
        )
    overwrites = 4 if task == "mqar_overwrite" else 0
    train = [(64, 100_000, 4), (128, 20_000, 8), (256, 20_000, 16), (256, 20_000, 32)]
    train.append((256, 20_000, 64))
    tests = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    if overwrites:
        train = [(64, 100_000, 4), (128, 20_000, 9), (256, 20_000, 16), (256, 20_000, 25)]
        train.append((256, 20_000, 36))
        tests = [(64, 4), (64, 9), (128, 16), (256, 36), (512, 64), (1024, 144), (2048, 256)]

    def rows(length: int, pairs: int) -> Zoology:
        return Zoology(length=length, pairs=pairs, overwrites=overwrites)

    segments = tuple(Segment(rows(length, pairs), count) for length, count, pairs in train)
    loads = [rows(*shape) for shape in tests]
    return Plan(
        task,
        layer,
        Course(segments, batch=256, epochs=epochs, seed=ZOOLOGY_SEED),
        {_load_name(law): law for law in loads},
        test_examples=1000,
        rates=ZOOLOGY_RATES,
        dropout=0.1,
        as_zoology=True,
    )


def harder(rows: Rows, width: int = 32) -> dict[str, Rows]:
    """Rows past what training showed, by name; those that the vocabulary has no room for are not.

    More pairs, twice as many pairs as a memory has keys, longer gaps, more overwrites, overlapping
    keys, more noise.

    Args:
        rows: the hardest of training.
        width: of a memory's keys.
    """
    changes: dict[str, dict[str, Any]] = {}
    if isinstance(rows, Zoology):
        for times in (2, 4):
            wider = {"length": times * rows.length, "pairs": times * rows.pairs}
            changes[f"{times} x pairs"] = wider
        changes[f"{2 * width} pairs, 2 x width"] = {"length": 8 * width, "pairs": 2 * width}
        changes["4 x length"] = {"length": 4 * rows.length}
        changes["4 x length, late queries"] = {"length": 4 * rows.length, "power": 1.0}
        for count in (rows.pairs // 2, rows.pairs):
            room = max(rows.length, 4 * rows.pairs + 2 * count)
            changes[f"{count} overwrites"] = {"length": room, "overwrites": count}
    elif isinstance(rows, AssociativeRecall):
        changes = {f"{times} x pairs": {"pairs": times * rows.pairs} for times in (2, 4, 8, 16)}
        changes[f"{2 * width} pairs, 2 x width"] = {"pairs": 2 * width}
        changes |= {f"overlap {cosine}": {"overlap": cosine} for cosine in (0.5, 0.9)}
        changes["every key revised"] = {"revisions": rows.pairs}
    else:
        changes = {f"{times} x length": {"length": times * rows.length} for times in (2, 4)}
        if isinstance(rows, InContextRecall) and rows.noise:
            changes |= {f"noise {share}": {"noise": share} for share in (0.4, 0.6, 0.8)}
        if isinstance(rows, SelectiveCopy):
            changes["2 x copied"] = {"length": 2 * rows.length, "copied": 2 * rows.copied}
    found = {}
    for name, change in changes.items():
        with suppress(ModelError):
            found[name] = replace(rows, **change)
    return {name: law for name, law in found.items() if law != rows}


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, from which `from_data` makes it again."""
    data = asdict(plan)
    data["tests"] = {name: _rows_as_data(rows) for name, rows in plan.tests.items()}
    data["course"]["segments"] = [
        {"rows": _rows_as_data(segment.rows), "examples": segment.examples}
        for segment in plan.course.segments
    ]
    return data


def from_data(data: Mapping[str, Any]) -> Plan:
    """Make a plan from plain data."""
    course = dict(data["course"])
    course["segments"] = tuple(
        Segment(_rows_from_data(segment["rows"]), segment["examples"])
        for segment in course["segments"]
    )
    tests = {name: _rows_from_data(rows) for name, rows in data["tests"].items()}
    lists = {"rates": tuple(data["rates"]), "seeds": tuple(data["seeds"])}
    return Plan(**{**data, **lists, "course": Course(**course), "tests": tests})


def _rows_as_data(rows: Rows) -> dict[str, Any]:
    return {"kind": type(rows).__name__, **asdict(rows)}


def _rows_from_data(data: Mapping[str, Any]) -> Rows:
    parts = dict(data)
    return _KINDS[parts.pop("kind")](**parts)


def _half_the_pairs(rows: Rows) -> Rows:
    if not isinstance(rows, Zoology | AssociativeRecall):
        return rows
    pairs = max(1, rows.pairs // 2)
    if isinstance(rows, Zoology):
        return replace(rows, pairs=pairs, overwrites=min(rows.overwrites, pairs))
    return replace(rows, pairs=pairs, revisions=min(rows.revisions, pairs))


def _load_name(rows: Rows) -> str:
    if isinstance(rows, Zoology):
        return f"{rows.pairs} pairs, length {rows.length}"
    if isinstance(rows, AssociativeRecall):
        return f"{rows.pairs} pairs"
    return f"length {rows.length}"
