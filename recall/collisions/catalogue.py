"""The collision studies by name, and what of each is shown in a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .crowd import crowd
from .curves import Curve, Setting, Study, together
from .forgetting import forgetting
from .reliability import ORDERS as TRUSTED
from .reliability import reliability
from .two_keys import ORDERS, OVERLAP, confidence, one_key, overlap


@dataclass(frozen=True)
class Column:
    """A column of a study's table: curves of this order, quantity and axis, at their last point."""

    axis: str
    order: str
    quantity: str


@dataclass(frozen=True)
class CollisionStudy:
    """A study.

    Args:
        run: what finds its curves.
        title: what is written, and what is read.
        columns: of its table, and panels of its plot.
        panels: further ones of its plot.
    """

    run: Study
    title: str
    columns: tuple[Column, ...]
    panels: tuple[Column, ...] = ()


def _columns(axis: str, orders: Sequence[str], *quantities: str) -> tuple[Column, ...]:
    return tuple(Column(axis, order, quantity) for quantity in quantities for order in orders)


_BOTH = tuple(ORDERS)
_WEIGHTS = ("retention", "intrusion")

STUDIES = {
    "one_key": CollisionStudy(
        one_key,
        "n different values, written with one key",
        _columns("writes", _BOTH, *_WEIGHTS),
    ),
    "confidence": CollisionStudy(
        confidence,
        "a value written m times, then another once, with one key",
        _columns("confirmations", _BOTH[:1], *_WEIGHTS),
    ),
    "overlap": CollisionStudy(
        overlap,
        f"a value written once, another n times with a key of cosine {OVERLAP} to its own",
        _columns("others", _BOTH, *_WEIGHTS),
        _columns("cosine", _BOTH, "retention"),
    ),
    "crowd": CollisionStudy(
        crowd,
        "a value written once among N others, with random keys 64 wide",
        _columns("others", _BOTH, *_WEIGHTS, "accuracy")
        + _columns("others", _BOTH[:1], "squared error", "stated variance"),
    ),
    "forgetting": CollisionStudy(
        forgetting,
        "with decay 0.98 and drift 1 - 0.98², where a layer takes them",
        _columns("writes", ("",), "gain")
        + _columns("others", ("",), "retention")
        + _columns("written before", ("",), "writes to overwrite"),
    ),
    "reliability": CollisionStudy(
        reliability,
        "a value written with one key, in turn with noise ρ and 20 ρ",
        _columns("pairs", tuple(TRUSTED), "clean share", "squared error")
        + _columns("pairs", ("noisy last",), "stated variance", "squared error, not told"),
    ),
}
"""By name: C1 to C6."""


def run(
    names: Sequence[str],
    layers: Sequence[str],
    setting: Setting,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Curve]:
    """Run studies on layers; layers whose curves agree share them.

    Args:
        names: of `STUDIES`.
        layers: names of the catalogue.
        setting: what the studies share.
        progress: called as each layer begins.
    """
    return [
        curve for name in names for curve in together(STUDIES[name].run(layers, setting, progress))
    ]
