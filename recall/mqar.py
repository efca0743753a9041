"""Batches of multi-query associative recall (Zoology): key-value pairs, then queries.

A row is `k1 v1 k2 v2 ... | queries`, and `labels` holds a query's value at the query's position,
-100 elsewhere. A key may be written more than once; the last value counts. Between and after the
queries lie fillers, zeros or random tokens, which are neither written nor read.

Source: Arora et al. (2023), Zoology, arXiv 2312.04927.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from design_models import ModelError

UNLABELLED = -100
LARGEST_TOKEN = 1_000_000
"""Every token up to the largest gets a direction, so tokens may not be arbitrarily large."""


@dataclass(frozen=True)
class RecallBatch:
    """What is written and what is asked, row by row.

    Args:
        keys: key tokens in the order of writing.
        values: the value tokens written with them.
        queries: key tokens that are asked for.
        answers: the value token each query should return.
        candidates: every value token an answer is decoded among.
    """

    keys: Int[np.ndarray, "row write"]
    values: Int[np.ndarray, "row write"]
    queries: Int[np.ndarray, "row query"]
    answers: Int[np.ndarray, "row query"]
    candidates: Int[np.ndarray, " candidate"]


def shipped_batch() -> Path:
    """The batch that comes with the package: 64 rows of 8 pairs, made by Zoology's generator."""
    return Path(str(resources.files("recall") / "data" / "golden_mqar_a.npz"))


def read_batch(path: Path) -> RecallBatch:
    """Read `inputs`, `labels` and, where it is there, `config` from a .npz file.

    Raises:
        ModelError: no such file, not a .npz, or not a batch of recall.
    """
    if not path.is_file():
        found = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise ModelError(f"{found}; give a .npz that holds `inputs` and `labels`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive may raise almost anything
        raise ModelError(
            f"{path} is not a .npz file of plain arrays; write one with "
            "np.savez(file, inputs=..., labels=...), without pickled objects."
        ) from error
    missing = [name for name in ("inputs", "labels") if name not in held]
    if missing:
        raise ModelError(
            f"{path} holds {_names(sorted(held))}, but not {_names(missing)}; a batch needs both "
            "`inputs` and `labels`."
        )
    return parse_batch(held["inputs"], held["labels"], _config(path, held))


def parse_batch(
    inputs: np.ndarray, labels: np.ndarray, config: Mapping[str, Any] | None = None
) -> RecallBatch:
    """Take a batch apart into writes and queries.

    Args:
        inputs: tokens (row, position).
        labels: values at the positions of queries, -100 elsewhere.
        config: may hold `num_kv_pairs`, `num_updates`, `num_passes` and `vocab_size`. Without
            `num_kv_pairs` the context is the shortest that answers every query; a pair after it
            that no row asks for is then taken for filler. Without `vocab_size` an answer is
            decoded among the values seen in the batch.

    Raises:
        ModelError: shapes disagree, rows hold no queries or differ in their number, or a label is
            not the value last written with its key.
    """
    config = {} if config is None else config
    asked = _check(inputs, labels)
    width = inputs.shape[1]
    first = int(np.argmax(asked.any(axis=0)))  # nothing is written from the first query on
    if "num_kv_pairs" in config:
        passes = _count(config, "num_passes", 1)
        pairs = _count(config, "num_kv_pairs", 0) * passes + _count(config, "num_updates", 0)
        if pairs < 1 or 2 * pairs > first:
            raise ModelError(
                f"`config` says {pairs} pairs, which take {2 * pairs} positions, but the first "
                f"label is at position {first} of {width}; correct `num_kv_pairs` and "
                "`num_updates`, or leave `config` out."
            )
    else:
        pairs = _shortest_context(inputs, labels, asked, first // 2)
    keys, values = inputs[:, : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2]
    shape = (len(inputs), int(asked[0].sum()))
    queries, answers = inputs[asked].reshape(shape), labels[asked].reshape(shape)
    _check_answers(keys, values, queries, answers)
    candidates = np.unique(values)
    if "vocab_size" in config:
        size = _count(config, "vocab_size", 0)
        _check_tokens("`vocab_size` of `config`", size)
        candidates = np.union1d(candidates, np.arange(size // 2, size))
    return RecallBatch(keys, values, queries, answers, candidates)


def _check(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Check shapes and tokens; return where the queries are."""
    if inputs.ndim != 2 or inputs.shape != labels.shape or not inputs.size:
        raise ModelError(
            f"`inputs` is {inputs.shape} and `labels` {labels.shape}; both must be (row, position)."
        )
    if not all(np.issubdtype(array.dtype, np.integer) for array in (inputs, labels)):
        raise ModelError(
            f"`inputs` is {inputs.dtype} and `labels` {labels.dtype}; tokens must be integers."
        )
    asked = labels != UNLABELLED
    counts = np.unique(asked.sum(axis=1))
    if len(counts) != 1 or counts[0] == 0:
        raise ModelError(
            f"rows hold {_names(counts.tolist())} labels; every row must hold as many, above 0 "
            f"(positions without one hold {UNLABELLED})."
        )
    for name, tokens in (("`inputs`", inputs), ("`labels`", labels[asked])):
        if tokens.min() < 0:
            raise ModelError(f"{name} holds the token {tokens.min()}; tokens count from 0.")
        _check_tokens(name, int(tokens.max()))
    return asked


def _check_tokens(name: str, largest: int) -> None:
    if largest > LARGEST_TOKEN:
        raise ModelError(f"{name} reaches {largest}; tokens may reach {LARGEST_TOKEN}.")


def _shortest_context(inputs: np.ndarray, labels: np.ndarray, asked: np.ndarray, most: int) -> int:
    """Fewest pairs at the start of every row that hold each query's key with its label."""
    keys, values = inputs[:, : 2 * most : 2], inputs[:, 1 : 2 * most : 2]
    needed = 0
    for row, position in np.argwhere(asked):
        key, label = inputs[row, position], labels[row, position]
        places = np.flatnonzero((keys[row] == key) & (values[row] == label))
        if not len(places):
            raise ModelError(
                f"row {row} asks for key {key} with label {label}, but no pair before the first "
                f"query ({most} fit) writes that; a batch is key, value, key, value, ..., queries."
            )
        needed = max(needed, int(places[0]) + 1)
    while needed < most and _wrong(keys, values, needed, inputs, labels, asked):
        needed += 1
    return needed


def _wrong(keys, values, pairs: int, inputs, labels, asked) -> bool:
    shape = (len(inputs), -1)
    queries, answers = inputs[asked].reshape(shape), labels[asked].reshape(shape)
    return bool(_mismatched(keys[:, :pairs], values[:, :pairs], queries, answers)[0].any())


def _check_answers(
    keys: np.ndarray, values: np.ndarray, queries: np.ndarray, answers: np.ndarray
) -> None:
    """Check that every label is the value last written with its key."""
    wrong, known, written = _mismatched(keys, values, queries, answers)
    if wrong.any():
        row, query = np.argwhere(wrong)[0]
        found = (
            f"the last pair with it holds {written[row, query]}"
            if known[row, query]
            else "no pair holds it"
        )
        raise ModelError(
            f"row {row} asks for key {queries[row, query]} with label {answers[row, query]}, but "
            f"among its {keys.shape[1]} pairs {found}; `num_kv_pairs` and `num_updates` in "
            "`config` say how many pairs there are."
        )


def _mismatched(
    keys: np.ndarray, values: np.ndarray, queries: np.ndarray, answers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which answers are not the value last written, which keys are written, and that value."""
    matches = queries[:, :, None] == keys[:, None, :]
    last = keys.shape[1] - 1 - np.argmax(matches[..., ::-1], axis=-1)
    written = np.take_along_axis(values, last, axis=1)
    known = matches.any(axis=-1)
    return ~known | (written != answers), known, written


def _count(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"`{name}` in `config` is {value!r}; it must be a whole number.")
    return value


def _names(items: list) -> str:
    return ", ".join(str(item) for item in items) or "nothing"


def _config(path: Path, held: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if "config" not in held:
        return {}
    text = held["config"].item() if held["config"].ndim == 0 else None
    try:
        config = json.loads(text) if isinstance(text, str | bytes) else None
    except ValueError as error:
        raise ModelError(f"`config` of {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"`config` of {path} is not a JSON object; correct it, or leave it out.")
    return config
