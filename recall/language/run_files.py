"""Files of a language model's run: also the model that it ends with."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError
from recall.checkpoints.folder import Checkpoint, write_checkpoint
from recall.kept_run import KeptRun


@dataclass(frozen=True)
class RunFiles(KeptRun):
    """Where a run's files lie."""

    @property
    def model(self) -> Path:
        return self.path / "model"

    def read_plan(self) -> dict[str, Any]:
        """The plan of a run that is to go on.

        Raises:
            ModelError: there is none.
        """
        try:
            return json.loads(self.plan_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`--out` is {self.path}, which holds no run to go on with; leave out --resume."
            ) from error

    def write_model(self, checkpoint: Checkpoint) -> None:
        """Write the model's folder, in place of one that an earlier call was stopped in."""
        if self.model.exists():
            shutil.rmtree(self.model)
        write_checkpoint(self.model, checkpoint)
