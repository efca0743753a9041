"""Which known recurrence a derived filter is, or is a special case of."""

from dataclasses import dataclass
from functools import cache, partial

from jaxtyping import Array

from design_models.catalogue import CATALOGUE, Recurrence
from design_models.policy import Exact

from .derivation import discover_structure, prove_at_examples
from .proof import Proof
from .structure import Structure

_GENERALITY = {"zero": 0, "identity": 0, "scalar": 1, "diagonal": 2, "dense": 3}


@dataclass(frozen=True)
class Kinship:
    """Relations of a derived filter to the catalogue.

    Args:
        same: entries whose exact filter has the same structure.
        general: entries of which it is a special case, the closest first.
        reductions: what the catalogue makes of the same design model by a covariance policy.
    """

    same: tuple[str, ...]
    general: tuple[str, ...]
    reductions: tuple[str, ...]

    @property
    def words(self) -> str:
        """The closest entry in a sentence."""
        if self.same:
            text = f"the recurrence of {' and '.join(self.same)}"
        elif self.general:
            text = f"not in the catalogue; a special case of {self.general[0]}"
        else:
            text = "not in the catalogue, nor a special case of an entry"
        if self.reductions:
            text += f" (reduced covariance: {', '.join(self.reductions)})"
        return text


def find_kin(structure: Structure) -> Kinship:
    """Compare a structure with the structures of the catalogue, derived in the same way."""
    same, general, reductions = [], [], []
    for entry in CATALOGUE.values():
        key = _design_key(entry)
        if _observes(key) != (structure.evidence > 0, structure.observations > 0):
            continue
        other = _derived_structure(key)
        if _signature(structure) == _signature(other):
            (same if isinstance(entry.policy, Exact) else reductions).append(entry.name)
        elif isinstance(entry.policy, Exact) and (distance := _distance(structure, other)):
            general.append((distance, entry.name))
    return Kinship(tuple(same), tuple(name for _, name in sorted(general)), tuple(reductions))


def _signature(structure: Structure) -> tuple:
    return (
        structure.kind,
        structure.transition,
        structure.drift,
        structure.evidence > 0,
        min(structure.observations, 2),
        structure.shifted,
        structure.evidence_sees_memory,
    )


def _distance(structure: Structure, other: Structure) -> int | None:
    """How far `structure` is below `other` in generality; None where it is not below."""
    alike = (
        structure.kind == other.kind
        and (structure.evidence > 0) == (other.evidence > 0)
        and structure.observations == other.observations
        and structure.shifted == other.shifted
        and structure.evidence_sees_memory == other.evidence_sees_memory
    )
    gaps = [
        _GENERALITY[getattr(other, name)] - _GENERALITY[getattr(structure, name)]
        for name in ("transition", "drift")
    ]
    return sum(gaps) if alike and min(gaps) >= 0 and sum(gaps) > 0 else None


def _design_key(entry: Recurrence) -> str:
    """Entries with the same design model share one derivation."""
    design = entry.design
    for other in CATALOGUE.values():
        if same_design(other.design, design):
            return other.name
    return entry.name


def same_design(first, second) -> bool:
    """Whether two design factories are the same function with the same settings."""
    if isinstance(first, partial) and isinstance(second, partial):
        return first.func is second.func and first.keywords == second.keywords
    return first is second


@cache
def _proved(name: str) -> tuple[Proof, dict[str, Array]]:
    return prove_at_examples(CATALOGUE[name].model())


def _observes(name: str) -> tuple[bool, bool]:
    """Whether something is observed about the change, and about the memory."""
    proof, _ = _proved(name)
    return bool(proof.transition.observed), bool(proof.observe.observed)


@cache
def _derived_structure(name: str) -> Structure:
    return discover_structure(*_proved(name))[1]
