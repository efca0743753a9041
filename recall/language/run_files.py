"""Files of a run: its plan, its checkpoint, its model and its record."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError
from recall.checkpoints.folder import Checkpoint, write_checkpoint
from recall.records import write_json


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files lie."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def state(self) -> Path:
        return self.path / "state.eqx"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def create(self, plan: Mapping[str, Any]) -> None:
        """Make the folder of a new run.

        Raises:
            ModelError: it holds a run already, or cannot be made.
        """
        if self.plan.exists():
            raise ModelError(
                f"`--out` is {self.path}, which holds a run; add --resume to go on with it, or "
                "name another folder."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.plan, plan)
        except OSError as error:
            raise ModelError(f"`--out` is {self.path}: {error.strerror}.") from error

    def read_plan(self) -> dict[str, Any]:
        """The plan of a run that is to go on.

        Raises:
            ModelError: there is none.
        """
        try:
            return json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`--out` is {self.path}, which holds no run to go on with; leave out --resume."
            ) from error

    def read_record(self) -> dict[str, Any] | None:
        """The record of a run that is finished."""
        if not self.record.is_file():
            return None
        return json.loads(self.record.read_text(encoding="utf-8"))

    def write_model(self, checkpoint: Checkpoint) -> None:
        """Write the model's folder, in place of one that an earlier call was stopped in."""
        if self.model.exists():
            shutil.rmtree(self.model)
        write_checkpoint(self.model, checkpoint)
