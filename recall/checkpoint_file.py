"""A pytree of arrays on disk beside what is said of it: a kill leaves the last one whole."""

import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx

from design_models import ModelError


def save_checkpoint(path: Path, tree: Any, head: dict[str, Any]) -> None:
    """Write a checkpoint in place of the last one."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.write((json.dumps(head) + "\n").encode())
        eqx.tree_serialise_leaves(file, tree)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load_checkpoint(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The checkpoint, shaped like `like`, and what was said of it.

    Raises:
        ModelError: it is damaged, or of another plan.
    """
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            return eqx.tree_deserialise_leaves(file, like), head
    except (ValueError, RuntimeError, EOFError, KeyError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it to start again.") from error
