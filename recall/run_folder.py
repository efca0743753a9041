"""A recall run on disk: its plan, its last checkpoint, its record and its plots."""

import json
from dataclasses import dataclass

from design_models import ModelError

from .kept_run import KeptRun
from .plans import Plan, as_data, from_data


@dataclass(frozen=True)
class RunFolder(KeptRun):
    """The files of a training run."""

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
