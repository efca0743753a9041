"""A training run on disk: its plan, its last checkpoint, its record and its plots."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError

from .checkpoint_file import load_checkpoint, save_checkpoint
from .plans import Plan, as_data, from_data
from .records import write_json
from .training import Runs

History = dict[str, list[list[float]]]
"""`loss` and `accuracy`: for every step, those of every run; `pieces`: of each, seconds in all, and
tokens and seconds of its steps but the first."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.eqx"

    @property
    def record_file(self) -> Path:
        return self.path / "record.json"

    def create(self, plan: Plan) -> None:
        """Make the folder of a new run.

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
            write_json(self.plan_file, as_data(plan))
        except OSError as error:
            raise ModelError(f"`--out` is {self.path}: {error.strerror}.") from error

    def plan(self) -> Plan:
        """The run's plan.

        Raises:
            ModelError: there is none.
        """
        if not self.plan_file.is_file():
            raise ModelError(
                f"{self.path} holds no run; start one: mbd train TASK --layer NAME --out "
                f"{self.path}."
            )
        try:
            return from_data(json.loads(self.plan_file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.plan_file} is no plan of this version: {error}.") from error

    def record(self) -> dict[str, Any] | None:
        """The record of a run that is finished."""
        if not self.record_file.is_file():
            return None
        return json.loads(self.record_file.read_text(encoding="utf-8"))

    def save(self, runs: Runs, step: int, history: History) -> None:
        """Write a checkpoint in place of the last one; a kill leaves one of the two whole."""
        save_checkpoint(self.checkpoint_file, runs, {"step": step, "history": history})

    def load(self, like: Runs) -> tuple[Runs, int, History]:
        """The last checkpoint: runs, the step to go on with, and the history before it.

        Raises:
            ModelError: it is damaged, or of another plan.
        """
        if not self.checkpoint_file.exists():
            return like, 0, {"loss": [], "accuracy": []}
        runs, head = load_checkpoint(self.checkpoint_file, like)
        return runs, head["step"], head["history"]
