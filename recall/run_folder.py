"""A training run on disk: its plan, its last checkpoint, its record and its plots."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from design_models import ModelError

from .kept_run import KeptRun
from .pieces import read_pieces, write_pieces
from .plans import Plan, as_data, from_data
from .processes import wait_for_all
from .training import Runs

History = dict[str, list[list[float]]]
"""`loss` and `accuracy`: for every step, those of every run; `pieces`: of each, seconds in all, and
tokens and seconds of its steps but the first."""


@dataclass(frozen=True)
class RunFolder(KeptRun):
    """The files of a training run."""

    @property
    def checkpoint_file(self) -> Path:
        """Says which folder of arrays is the last whole one, and the history before it."""
        return self.path / "checkpoint.json"

    def create(self, plan: Plan) -> None:
        """Make the folder of a new run.

        Raises:
            ModelError: it holds a run already, or cannot be made.
        """
        self.create_folder(as_data(plan))

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

    def save(self, runs: Runs, step: int, history: History) -> None:
        """Write a checkpoint in place of the last one; a kill leaves one of the two whole.

        Every process of the run writes the arrays of its devices, and the first one the rest.
        """
        arrays = self.path / f"checkpoint-{step}"
        write_pieces(arrays, runs)
        wait_for_all(f"pieces of step {step}")
        if jax.process_index() > 0:
            return
        beside = self.checkpoint_file.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"arrays": arrays.name, "step": step, "history": history}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.checkpoint_file)
        for old in self.path.glob("checkpoint-*"):
            if old != arrays:
                shutil.rmtree(old)

    def saved_step(self) -> int:
        """The step that the last checkpoint goes on with; 0 where there is none."""
        if not self.checkpoint_file.is_file():
            return 0
        return json.loads(self.checkpoint_file.read_text(encoding="utf-8"))["step"]

    def load(self, like: Runs) -> tuple[Runs, int, History]:
        """The last checkpoint: runs, the step to go on with, and the history before it.

        Raises:
            ModelError: it is damaged, or of another plan.
        """
        if not self.checkpoint_file.exists():
            return like, 0, {"loss": [], "accuracy": []}
        try:
            head = json.loads(self.checkpoint_file.read_text(encoding="utf-8"))
            runs = read_pieces(self.path / head["arrays"], like)
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{self.checkpoint_file} cannot be read ({error}); remove it to start again."
            ) from error
        return runs, head["step"], head["history"]
