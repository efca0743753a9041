"""What a study finds: a quantity, measured and predicted, along an axis."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Claim = Literal["algebra", "expectation", "wide keys"]
"""How a prediction is meant: of every draw, to rounding; of the mean over draws; or of that mean,
as keys grow wide."""

ROUNDING = 1e-8
STANDARD_ERRORS = 5.0
WIDE_KEYS = 0.02
"""Departures that a claim allows: absolute or relative; of the mean; and relative, for wide keys of
64 entries or more, on top of that."""


@dataclass(frozen=True)
class Setting:
    """What all studies share.

    Args:
        noise: ρ, noise variance over prior variance of a write; delta rules write with
            β = 1/(1 + ρ).
        width: K, entries of a key, in the crowd; two keys have `two_keys.KEY_WIDTH`.
        draws: how often keys are drawn.
        seed: of all draws.
    """

    noise: float = 0.1
    width: int = 64
    draws: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Curve:
    """A quantity along an axis.

    Args:
        study: its name.
        order: what comes when, where a study has several orders.
        quantity: what was measured.
        axis: what changes along it.
        at: where on the axis.
        layers: names of those that this was measured of, to rounding.
        measured: mean over draws.
        standard_error: of that mean.
        predicted: in closed form; None where there is no form.
        claim: how that is meant.
    """

    study: str
    order: str
    quantity: str
    axis: str
    at: tuple[float, ...]
    layers: tuple[str, ...]
    measured: tuple[float, ...]
    standard_error: tuple[float, ...]
    predicted: tuple[float, ...] | None = None
    claim: Claim | None = None

    @property
    def departs(self) -> bool:
        """Whether a measurement is further from its prediction than the claim allows."""
        if self.predicted is None:
            return False
        measured, predicted = np.asarray(self.measured), np.asarray(self.predicted)
        allowed = ROUNDING * np.maximum(1, np.abs(predicted))
        if self.claim != "algebra":
            allowed = allowed + STANDARD_ERRORS * np.asarray(self.standard_error)
        if self.claim == "wide keys":
            allowed = allowed + WIDE_KEYS * np.abs(predicted)
        return bool(np.any(np.abs(measured - predicted) > allowed))

    def as_record(self) -> dict[str, Any]:
        """The curve as plain data, to six digits; also its largest departure from the form."""
        data = asdict(self)
        for name in ("measured", "standard_error", "predicted"):
            numbers = data[name]
            data[name] = numbers and [float(f"{number:.6g}") for number in numbers]
        if self.predicted is not None:
            apart = np.abs(np.subtract(self.measured, self.predicted))
            data["largest_departure"] = float(f"{np.max(apart):.2g}")
        if not any(self.standard_error):
            del data["standard_error"]
        return data


@dataclass(frozen=True)
class Axis:
    """Of which study, in which order, and along what a quantity is measured."""

    study: str
    order: str
    name: str
    at: tuple[float, ...]

    def curve(
        self,
        layer: str,
        quantity: str,
        measured: Float[np.ndarray, "draw point"],
        predicted: Float[np.ndarray, "draw point"] | Float[np.ndarray, " point"] | None = None,
        claim: Claim | None = None,
    ) -> Curve:
        """A layer's curve, as means over draws."""
        draws = len(measured)
        deviation = measured.std(axis=0, ddof=1) if draws > 1 else np.zeros(len(self.at))
        if predicted is not None:
            predicted = np.broadcast_to(predicted, measured.shape).mean(axis=0)
        return Curve(
            self.study,
            self.order,
            quantity,
            self.name,
            self.at,
            (layer,),
            tuple(measured.mean(axis=0).tolist()),
            tuple((deviation / draws**0.5).tolist()),
            None if predicted is None else tuple(predicted.tolist()),
            claim if predicted is not None else None,
        )


def together(curves: Sequence[Curve]) -> list[Curve]:
    """One curve for all layers whose curves agree to rounding, in all quantities of a study."""
    study: dict[str, list[Curve]] = {}
    for curve in curves:
        study.setdefault(curve.layers[0], []).append(curve)
    kept: dict[str, list[str]] = {}
    for layer, own in study.items():
        alike = next((name for name in kept if _agree(study[name], own)), None)
        kept.setdefault(layer if alike is None else alike, []).append(layer)
    return [
        replace(curve, layers=tuple(names))
        for layer, names in kept.items()
        for curve in study[layer]
    ]


def _agree(first: Sequence[Curve], second: Sequence[Curve]) -> bool:
    return len(first) == len(second) and all(
        a.claim == b.claim
        and np.allclose(a.measured, b.measured, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


Study = Callable[[Sequence[str], Setting, Callable[[str], None]], list[Curve]]
"""(layers, setting, progress) -> curves."""
