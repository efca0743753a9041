"""Which closed forms apply to a layer of the catalogue."""

from enum import Enum

from design_models.catalogue import ENTRIES, INCREMENTS, RETENTION, recurrence
from design_models.policy import Diagonal, Isotropic, Reset


class Kind(Enum):
    """What decides a layer's weights while nothing is made to decay, drift or fade."""

    EXACT = "exact regression"
    RESET = "delta rule"
    COUNTED = "delta rule with the gain 1/(t + ρ)"
    DIAGONAL = "a variance per key"
    SUPERPOSED = "superposition"
    ENTRIES = "independent entries"
    RESET_ENTRIES = "independent entries, reset"


def kind(layer: str) -> Kind:
    """The kind of a layer.

    Raises:
        ModelError: the catalogue has no such layer.
    """
    entry = recurrence(layer)
    is_reset = isinstance(entry.policy, Reset)
    if entry.assumption == INCREMENTS:
        return Kind.SUPERPOSED
    if entry.assumption == ENTRIES:
        return Kind.RESET_ENTRIES if is_reset else Kind.ENTRIES
    if is_reset:
        return Kind.RESET
    if isinstance(entry.policy, Isotropic):
        return Kind.COUNTED
    return Kind.DIAGONAL if isinstance(entry.policy, Diagonal) else Kind.EXACT


def own_decay(layer: str) -> float:
    """The decay that a layer has whatever it is given: RetNet's."""
    return RETENTION if layer == "retnet" else 1.0
