"""Studies of two keys that collide: one key for both (C1, C2), or a partial overlap (C3).

A target value is written with its key, another value with a key of cosine c to it, and the target's
key is read. Its weight in the read-out is the *retention*, the other's the *intrusion*. What the
other does when it comes later is retroactive interference, when it came before, proactive.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from inference.retrieval import (
    TwoKeys,
    Weights,
    corrected_two_keys,
    counted_gains,
    entry_two_keys,
    exact_two_keys,
    reset_entry_two_keys,
    reset_gains,
    superposed_two_keys,
)

from .curves import Axis, Curve, Setting
from .kinds import Kind, kind, own_decay
from .readings import Forgetting, Read, Script, read

ORDERS = {"retroactive": False, "proactive": True}
"""By the interference: whether the target comes last."""

KEY_WIDTH = 16
"""Two keys span a plane, whatever their width; the width matters to independent entries only, and
to one variance per key."""

_WRITES = (1, 2, 4, 8, 16, 32, 64)
_OVERLAPS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
OVERLAP = 0.7
"""Where the number of writes changes and the overlap does not."""


def one_key(
    layers: Sequence[str], setting: Setting, progress: Callable[[str], None]
) -> list[Curve]:
    """C1: n values, all different, are written with one key; the first, and the last, is wanted."""
    cases = [TwoKeys(1, n - 1, 1.0) for n in _WRITES]
    return _studied("one_key", "writes", _WRITES, cases, ORDERS, layers, setting, progress)


def confidence(
    layers: Sequence[str], setting: Setting, progress: Callable[[str], None]
) -> list[Curve]:
    """C2: a value written m times is contradicted once."""
    orders = {"retroactive": False}
    cases = [TwoKeys(m, 1, 1.0) for m in _WRITES]
    return _studied(
        "confidence", "confirmations", _WRITES, cases, orders, layers, setting, progress
    )


def overlap(
    layers: Sequence[str], setting: Setting, progress: Callable[[str], None]
) -> list[Curve]:
    """C3: another value is written n times with a key that overlaps with the target's."""
    by_count = [TwoKeys(1, n, OVERLAP) for n in _WRITES]
    by_overlap = [TwoKeys(1, _WRITES[-1], c) for c in _OVERLAPS]
    given = ("overlap", "others", _WRITES, by_count), ("overlap", "cosine", _OVERLAPS, by_overlap)
    return [
        curve
        for study, axis, at, cases in given
        for curve in _studied(study, axis, at, cases, ORDERS, layers, setting, progress)
    ]


def _studied(study, axis, at, cases, orders, layers, setting, progress) -> list[Curve]:
    curves = []
    for layer in layers:
        progress(f"{study} ({axis}): {layer}")
        for order, last in orders.items():
            ordered = [TwoKeys(c.target, c.other, c.overlap, last) for c in cases]
            measured = measure(layer, ordered, setting)
            predicted = predict(layer, ordered, setting)
            along = Axis(study, order, axis, tuple(map(float, at)))
            for place, quantity in enumerate(("retention", "intrusion")):
                expected = None if predicted is None else predicted[..., place]
                curves.append(
                    along.curve(layer, quantity, measured[..., place], expected, "algebra")
                )
    return curves


def measure(
    layer: str, cases: Sequence[TwoKeys], setting: Setting, forgetting: Forgetting | None = None
) -> Float[np.ndarray, "draw case 2"]:
    """Retention and intrusion as the layer has them.

    Args:
        layer: its name.
        cases: what is written.
        setting: of the study.
        forgetting: none where left out.
    """
    # Every case is a choice of positions of one script: target, other, target.
    most, others = max(case.target for case in cases), max(case.other for case in cases)
    place = np.arange(most + others + most)
    is_other = (place >= most) & (place < most + others)
    parts = []
    for case in cases:
        first = 0 if not case.target_last else most + others
        own = (place >= first) & (place < first + case.target)
        parts.append((own, is_other & (place < most + case.other)))
    own, other = (np.array(part) for part in zip(*parts, strict=True))
    keys = [unit_keys(case.overlap, setting) for case in cases]
    target = np.array([pair[0] for pair in keys])[:, :, None]
    interfering = np.array([pair[1] for pair in keys])[:, :, None]
    shown = np.where(is_other[:, None], interfering, target).swapaxes(0, 1)
    flat = shown.reshape(-1, *shown.shape[2:])
    script = Script(
        flat,
        np.full(flat.shape[:2], setting.noise),
        np.tile(own | other, (setting.draws, 1)),
        target.swapaxes(0, 1).reshape(len(flat), -1),
    )
    found: Read = read(layer, script, forgetting)
    weights = found.weights.reshape(setting.draws, len(cases), -1)
    return np.stack([np.sum(weights * part, axis=-1) for part in (own, other)], axis=-1)


def predict(
    layer: str, cases: Sequence[TwoKeys], setting: Setting
) -> Float[np.ndarray, "draw case 2"] | None:
    """Retention and intrusion in closed form, without forgetting; None where there is no form."""
    if kind(layer) is Kind.DIAGONAL:
        return None
    pairs = [unit_keys(case.overlap, setting) for case in cases]
    return np.array(
        [
            [
                _weights(layer, case, target[draw], other[draw], setting.noise)
                for case, (target, other) in zip(cases, pairs, strict=True)
            ]
            for draw in range(setting.draws)
        ]
    )


def _weights(layer: str, case: TwoKeys, target, other, noise: float) -> Weights:
    writes = case.target + case.other
    match kind(layer):
        case Kind.EXACT:
            return exact_two_keys(case, noise)
        case Kind.RESET:
            return corrected_two_keys(case, reset_gains(writes, noise))
        case Kind.COUNTED:
            return corrected_two_keys(case, counted_gains(writes, noise))
        case Kind.SUPERPOSED:
            return superposed_two_keys(case, own_decay(layer))
        case Kind.ENTRIES:
            return entry_two_keys(case, target, other, noise)
        case _:
            return reset_entry_two_keys(case, target, other, noise)


def unit_keys(
    overlap: float, setting: Setting
) -> tuple[Float[np.ndarray, "draw key"], Float[np.ndarray, "draw key"]]:
    """Random unit keys, and others of that cosine to them."""
    rng = np.random.default_rng(setting.seed)
    drawn = rng.normal(size=(2, setting.draws, KEY_WIDTH))
    target = drawn[0] / np.linalg.norm(drawn[0], axis=-1, keepdims=True)
    apart = drawn[1] - np.sum(drawn[1] * target, axis=-1, keepdims=True) * target
    apart /= np.linalg.norm(apart, axis=-1, keepdims=True)
    return target, overlap * target + np.sqrt(1 - overlap**2) * apart
