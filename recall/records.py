"""What every record holds beside its metrics: command, commit, versions, device, seed."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from inference.certificate import package_versions

from .whole_files import written_whole

_CHECKOUT = Path(__file__).resolve().parent.parent


def record(
    config: Mapping[str, Any],
    metrics: Any,
    *,
    command: str,
    seed: int | Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Return a record of a run as plain data.

    Args:
        config: what was run, and with which settings.
        metrics: what came out.
        command: the command that makes this record again.
        seed: the seed, or all of them.
        seconds: how long it took.
    """
    return {
        "config": dict(config),
        "command": command,
        **commit(),
        "versions": package_versions(),
        "device": device(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "metrics": metrics,
    }


def keeper(
    path: Path, config: Mapping[str, Any], *, command: str, seed: int | Sequence[int]
) -> Callable[[Any], None]:
    """What writes a record of all metrics known so far, each time in place of the last.

    Args:
        path: of the record.
        config: as for `record`, like the rest; seconds count from here.
        command: the command that makes this record again.
        seed: the seed, or all of them.
    """
    began = time.perf_counter()

    def keep(metrics: Any) -> None:
        seconds = time.perf_counter() - began
        write_json(path, record(config, metrics, command=command, seed=seed, seconds=seconds))

    return keep


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether tracked files differ from it; None outside a checkout."""
    head = _git("rev-parse", "HEAD") if (_CHECKOUT / ".git").exists() else None
    if not head:
        return {"commit": None, "uncommitted_changes": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "uncommitted_changes": changes != ""}


def device() -> str:
    """The processor's architecture, and the devices that JAX computes on."""
    devices = jax.devices()
    kind = devices[0].device_kind
    return f"{platform.machine()} CPU, {f'{len(devices)} x ' if len(devices) > 1 else ''}{kind}"


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole; what is not finite is written as "inf", "-inf" or "nan".

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(plain(data), indent=2, allow_nan=False) + "\n"
    with written_whole(path) as file:
        file.write(text.encode())


def plain(data: Any) -> Any:
    """`data` in types that JSON has: arrays and NumPy's scalars become lists and numbers."""
    if isinstance(data, Mapping):
        return {str(name): plain(value) for name, value in data.items()}
    if isinstance(data, str | bool | int | None):
        return data
    if hasattr(data, "tolist"):
        return plain(data.tolist())
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Sequence | set | frozenset):
        return [plain(value) for value in data]
    return str(data)


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=_CHECKOUT, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
