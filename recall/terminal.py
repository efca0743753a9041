"""What is shown on a terminal while something is done, and where tables are printed."""

import sys
from typing import Any


def console() -> Any:
    """Where tables go; piped output is not cut to a terminal's width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


class Status:
    """A line on the terminal's error stream that says what is being done; silent when piped."""

    def __init__(self, doing: str) -> None:
        from rich.console import Console

        self.doing = doing
        self.status = Console(stderr=True).status(doing) if sys.stderr.isatty() else None

    def __enter__(self) -> "Status":
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.status is not None:
            self.status.stop()

    def stage(self, name: str) -> None:
        """Say which stage has begun."""
        if self.status is not None:
            self.status.update(f"{self.doing}: {name}")


class ProgressBar:
    """Progress on the terminal's error stream: loss, accuracy, speed, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self.task = self.progress.add_task("compiling", total=None)

    def __enter__(self) -> "ProgressBar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def report(self, step: int, steps: int, loss: float, accuracy: float, speed: float) -> None:
        """Say how far training is."""
        words = f"loss {loss:.3f}  accuracy {accuracy:.3f}  {speed:,.0f} tokens/s"
        self.show(step, steps, words)

    def show(self, step: int, steps: int, words: str) -> None:
        """Say how far training is, in words."""
        self.progress.update(self.task, total=steps, completed=step + 1, description=words)

    def stage(self, name: str) -> None:
        """Say which stage has begun."""
        self.progress.update(self.task, description=name)
