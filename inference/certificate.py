"""The record of a verification, which `layers` demands before it compiles a filter."""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from design_models.policy import Policy

from .exact_filter import ExactFilter
from .kinship import Kinship
from .oracles.check import Check
from .structure import Structure

_PACKAGES = ("jax", "jaxlib", "numpyro", "numpy", "equinox", "arviz-stats")


@dataclass(frozen=True)
class Certificate:
    """What was verified, how, and with what result.

    Args:
        name: the catalogue's name, or the object's.
        policy: what is done to the covariance before each write.
        structure: the derived filter's structure.
        update: the derived update in equations.
        kinship: the catalogue entries it is, or is a special case of.
        checks: every statistic, threshold and verdict.
        reduction_cost: divergence per step from the exact posterior, in nats; None where exact.
        seed: seed of inputs, simulated values and chains.
        steps: length of the verified sequence.
        sites: every sample site that was proved Gaussian, as "function/site: family shape".
        seconds: how long verification took.
        versions: of Python and the packages that took part.
        exact_filter: the filter that was verified (not part of the record).
    """

    name: str
    policy: Policy
    structure: Structure
    update: tuple[str, ...]
    kinship: Kinship
    checks: tuple[Check, ...]
    reduction_cost: float | None
    seed: int
    steps: int
    sites: tuple[str, ...]
    seconds: float
    versions: dict[str, str]
    exact_filter: ExactFilter = field(repr=False, compare=False)

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.holds)

    def record(self) -> dict[str, Any]:
        """The certificate as plain data, for JSON."""
        return {
            "name": self.name,
            "holds": self.holds,
            "policy": {"name": type(self.policy).__name__.lower(), **asdict(self.policy)},
            "structure": asdict(self.structure),
            "paths": list(self.structure.paths),
            "why_paths": self.structure.why_paths,
            "update": list(self.update),
            "kinship": asdict(self.kinship) | {"words": self.kinship.words},
            "checks": [asdict(check) | {"holds": check.holds} for check in self.checks],
            "reduction_cost_nats_per_step": self.reduction_cost,
            "seed": self.seed,
            "steps": self.steps,
            "sites": list(self.sites),
            "seconds": round(self.seconds, 2),
            "versions": self.versions,
        }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a verification."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
