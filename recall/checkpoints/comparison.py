"""Logits that another implementation gave, and how far the model's are from them."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from design_models import ModelError
from layers import LanguageModel

from .model import logits

LARGEST_ERROR = 1e-3
"""Relative; a wrong model is off by far more, another order of float32 sums by far less."""


@dataclass(frozen=True)
class Comparison:
    """How far logits are from those expected.

    Args:
        tokens: that were compared.
        error: of the worst token: norm of the difference over the norm of the expected logits.
        overall: the same over all tokens at once.
    """

    tokens: int
    error: float
    overall: float

    @property
    def agrees(self) -> bool:
        return self.error <= LARGEST_ERROR  # False where it is not a number


def compare(model: LanguageModel, path: Path) -> Comparison:
    """Compare with a safetensors file of `input_ids` and `logits`, row by row.

    Raises:
        ModelError: the file does not hold them, or not for this model.
    """
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"`--check` is {path}, no safetensors file: {error}.") from error
    missing = [name for name in ("input_ids", "logits") if name not in held]
    if missing:
        raise ModelError(f"`--check` is {path}, which holds no {missing[0]}.")
    tokens, expected = held["input_ids"], held["logits"].astype(np.float64)
    vocabulary = model.embedding.shape[0]
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ModelError(f"{path}: `input_ids` are {tokens.dtype} {tokens.shape}, not (row, time).")
    if expected.shape != (*tokens.shape, vocabulary):
        wanted = (*tokens.shape, vocabulary)
        raise ModelError(f"{path}: `logits` are {expected.shape}; they must be {wanted}.")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ModelError(f"{path}: `input_ids` must lie between 0 and {vocabulary - 1}.")
    found = [logits(model, jnp.asarray(row[None], jnp.int32))[0] for row in tokens]
    difference = np.asarray(found, np.float64) - expected
    return Comparison(
        tokens.size,
        float(np.max(_norm(difference, -1) / _norm(expected, -1))),
        float(_norm(difference, None) / _norm(expected, None)),
    )


def _norm(array: np.ndarray, axis: int | None) -> np.ndarray | np.floating:
    return np.sqrt(np.sum(array**2, axis=axis))
