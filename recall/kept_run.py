"""A run on disk: the plan that it goes on with, and the record that it ends with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_models import ModelError

from .records import write_json


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
