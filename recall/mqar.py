"""Batches of multi-query associative recall (Zoology): key-value pairs, then queries.

A row is `k1 v1 k2 v2 ... | queries`, and `labels` holds a query's value at the query's position,
-100 elsewhere. A key may be written more than once; the last value counts.

Source: Arora et al. (2023), Zoology, arXiv 2312.04927.
"""

import json
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Int

from design_models import ModelError

UNLABELLED = -100


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
        raise ModelError(f"there is no file {path}; give a .npz that holds `inputs` and `labels`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ModelError(f"{path} is not a .npz file of plain arrays.") from error
    missing = [name for name in ("inputs", "labels") if name not in held]
    if missing:
        raise ModelError(f"{path} holds {sorted(held)}, but not {missing}; a batch needs both.")
    return parse_batch(held["inputs"], held["labels"], _config(path, held))


def parse_batch(inputs: np.ndarray, labels: np.ndarray, config: dict) -> RecallBatch:
    """Take a batch apart into writes and queries.

    Args:
        inputs: tokens (row, position).
        labels: values at the positions of queries, -100 elsewhere.
        config: may hold `num_kv_pairs`, `num_updates` and `vocab_size`; what is missing is
            inferred: as many pairs as queries, and the values seen in the batch.

    Raises:
        ModelError: shapes disagree, or rows hold no queries or differ in their number.
    """
    if inputs.ndim != 2 or inputs.shape != labels.shape or not inputs.size:
        raise ModelError(
            f"`inputs` is {inputs.shape} and `labels` {labels.shape}; both must be (row, position)."
        )
    if not all(np.issubdtype(array.dtype, np.integer) for array in (inputs, labels)):
        raise ModelError(f"tokens are {inputs.dtype} and {labels.dtype}; both must be integers.")
    asked = labels != UNLABELLED
    counts = np.unique(asked.sum(axis=1))
    if len(counts) != 1 or counts[0] == 0:
        raise ModelError(
            f"rows hold {counts.tolist()} labels; every row must hold as many, above 0."
        )
    pairs = int(config.get("num_kv_pairs", counts[0])) + int(config.get("num_updates", 0))
    context = inputs[:, : 2 * pairs]
    if context.shape[1] < 2 * pairs or asked[:, : 2 * pairs - 1].any():
        raise ModelError(
            f"{pairs} pairs take {2 * pairs} positions; rows have {inputs.shape[1]}, or a label "
            "lies among them; `num_kv_pairs` in `config` says how many pairs there are."
        )
    keys, values = context[:, 0::2], context[:, 1::2]
    shape = (len(inputs), int(counts[0]))
    answers = labels[asked].reshape(shape)
    candidates = np.unique(np.concatenate([values.ravel(), answers.ravel()]))
    if "vocab_size" in config:
        vocabulary = np.arange(int(config["vocab_size"]) // 2, int(config["vocab_size"]))
        candidates = np.union1d(candidates, vocabulary)
    return RecallBatch(keys, values, inputs[asked].reshape(shape), answers, candidates)


def _config(path: Path, held: dict[str, np.ndarray]) -> dict:
    if "config" not in held:
        return {}
    try:
        config = json.loads(str(held["config"]))
    except json.JSONDecodeError as error:
        raise ModelError(f"`config` of {path} is not JSON: {error}.") from error
    return config if isinstance(config, dict) else {}
