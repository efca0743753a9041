"""A run on disk: its plan, the checkpoint that it goes on from, and the record it ends with."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from design_models import ModelError

from .pieces import read_pieces, write_pieces
from .processes import wait_for_all
from .records import write_json
from .whole_files import written_whole


@dataclass(frozen=True)
class KeptRun:
    """The files that every run has."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def record_file(self) -> Path:
        return self.path / "record.json"

    @property
    def checkpoint_file(self) -> Path:
        """Says which folder of arrays is the last whole one, and the history before it."""
        return self.path / "checkpoint.json"

    def create_folder(self, plan: Mapping[str, Any]) -> None:
        """Make the folder of a new run, with its plan.

        Raises:
            ModelError: it holds a run already, or cannot be made.
        """
        if self.plan_file.exists():
            raise ModelError(
                f"`--out` is {self.path}, which holds a run; add --resume to go on with it, or "
                "name another folder."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.plan_file, plan)
        except OSError as error:
            raise ModelError(f"`--out` is {self.path}: {error.strerror}.") from error

    def record(self) -> dict[str, Any] | None:
        """The record of a run that is finished."""
        if not self.record_file.is_file():
            return None
        return json.loads(self.record_file.read_text(encoding="utf-8"))

    def save(self, tree: Any, step: int, history: Mapping[str, Any]) -> None:
        """Write a checkpoint in place of the last one; a kill leaves one of the two whole.

        Every process of the run writes the arrays of its devices, and the first one the rest.
        """
        arrays = self.path / f"checkpoint-{step}"
        write_pieces(arrays, tree)
        wait_for_all(f"pieces of step {step}")
        if jax.process_index() > 0:
            return
        told = {"arrays": arrays.name, "step": step, "history": history}
        with written_whole(self.checkpoint_file) as file:
            file.write(json.dumps(told).encode())
        for old in self.path.glob("checkpoint-*"):
            if old != arrays:
                shutil.rmtree(old)

    def saved_step(self) -> int:
        """The step that the last checkpoint goes on with; 0 where there is none."""
        if not self.checkpoint_file.is_file():
            return 0
        return json.loads(self.checkpoint_file.read_text(encoding="utf-8"))["step"]

    def load[Tree](self, like: Tree) -> tuple[Tree, int, dict[str, Any]]:
        """The last checkpoint: a tree, the step to go on with, and the history before it.

        Where there is none: `like`, 0, and nothing.

        Raises:
            ModelError: it is damaged, or of another plan.
        """
        if not self.checkpoint_file.exists():
            return like, 0, {}
        try:
            head = json.loads(self.checkpoint_file.read_text(encoding="utf-8"))
            tree = read_pieces(self.path / head["arrays"], like)
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{self.checkpoint_file} cannot be read ({error}); remove it to start again."
            ) from error
        return tree, head["step"], head["history"]
