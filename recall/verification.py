"""Verify several subjects side by side, and gather certificates, refusals and progress."""

import multiprocessing
import os
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from design_models import CATALOGUE
from inference import Certificate, NotLinearGaussian, verify
from inference.oracles import joint, nuts, simulation, textbook
from layers import compile_filter

from .user_files import Subject


@dataclass(frozen=True)
class Outcome:
    """A certificate as plain data, or the refusal of the model."""

    name: str
    record: dict[str, Any]

    @property
    def holds(self) -> bool:
        return bool(self.record["holds"])

    @property
    def refused(self) -> dict[str, Any] | None:
        return self.record.get("refused")


def verify_subject(
    subject: Subject, *, seed: int, progress: Callable[[str], None]
) -> tuple[Outcome, Certificate | None]:
    """Verify one subject, and say what would run it; a refusal is an outcome, not an error."""
    try:
        certificate = verify(
            subject.model, name=subject.name, policy=subject.policy, seed=seed, progress=progress
        )
    except NotLinearGaussian as refusal:
        refused = {
            "function": refusal.function,
            "site": refusal.site,
            "reason": refusal.reason,
            "location": refusal.location,
            **_file_and_line(refusal.location),
            "kind": type(refusal).__name__,
        }
        return Outcome(
            subject.name, {"name": subject.name, "holds": False, "refused": refused}
        ), None
    record = certificate.record()
    if certificate.holds:
        record["backend"] = compile_filter(certificate).backend
    return Outcome(subject.name, record), certificate


def _file_and_line(location: str) -> dict[str, Any]:
    """Take "path:12 (function)" apart."""
    found = re.match(r"(.*):(\d+)", location)
    return {"file": found[1] if found else None, "line": int(found[2]) if found else None}


def verify_catalogue(
    names: Sequence[str], *, seed: int, report: Callable[[str, str], None]
) -> Iterator[Outcome]:
    """Verify entries of the catalogue in as many processes as there are cores.

    Args:
        names: entries of the catalogue.
        seed: seed of every verification.
        report: called with an entry's name and the stage it has reached.

    Yields:
        Outcomes in the order in which they finish.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(names), os.cpu_count() or 1))
    with context.Manager() as manager:
        stages = manager.Queue()
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = [pool.submit(_verify_entry, name, seed, stages) for name in names]
            waiting = set(futures)
            while waiting:
                while True:
                    try:
                        report(*stages.get(timeout=0.1))
                    except queue.Empty:
                        break
                for future in [future for future in waiting if future.done()]:
                    waiting.remove(future)
                    yield future.result()


def _verify_entry(name: str, seed: int, stages: Any) -> Outcome:
    jax.config.update("jax_enable_x64", True)
    entry = CATALOGUE[name]
    subject = Subject(name, entry.model(), entry.policy)
    try:
        return verify_subject(subject, seed=seed, progress=lambda stage: stages.put((name, stage)))[
            0
        ]
    except Exception as error:  # JAX's errors cannot cross to another process
        first = str(error).splitlines()[0] if str(error) else ""
        raise RuntimeError(f"{name}: {type(error).__name__}: {first}") from None


ORACLES = (joint.ORACLE, simulation.ORACLE, nuts.ORACLE, textbook.ORACLE)
"""Oracles in the order in which tables show them."""


def worst_check(record: dict[str, Any], oracle: str) -> dict[str, Any] | None:
    """The check of an oracle that comes closest to its threshold, or exceeds it most."""
    own = [check for check in record.get("checks", []) if check["oracle"] == oracle]
    if not own:
        return None
    return max(own, key=lambda check: check["statistic"] / max(check["threshold"], 1e-300))
