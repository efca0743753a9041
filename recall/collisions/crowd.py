"""C4: a target among N other values with random keys, up to many more than a key has entries.

Measured: retention, the target's weight in the read-out; intrusion, the sum of the others' squared
weights; accuracy, how often the read-out is nearest to the target's value of all that were written,
random unit vectors as wide as keys; the squared error of an entry of the read-out where values are
drawn from the design model, and the variance that the layer says it has.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from inference.retrieval import (
    Crowded,
    corrected_crowd,
    counted_gains,
    exact_crowd,
    read_error,
    reset_entry_crowd,
    reset_gains,
    superposed_crowd,
)

from .curves import Axis, Curve, Setting
from .kinds import Kind, kind, own_decay
from .readings import Script, read
from .two_keys import ORDERS

_LOADS = (1 / 8, 1 / 2, 1, 2, 4)
"""Others per entry of a key."""


def crowd(layers: Sequence[str], setting: Setting, progress: Callable[[str], None]) -> list[Curve]:
    """C4, for all layers, first with the target before the others, then after them."""
    counts = [max(1, round(load * setting.width)) for load in _LOADS]
    rng = np.random.default_rng(setting.seed)
    keys = _unit(rng.normal(size=(setting.draws, counts[-1] + 2, setting.width)))
    keys[:, -1] = keys[:, 0]  # the target's, first or last
    codes = _unit(rng.normal(size=(setting.draws, counts[-1] + 2, setting.width)))
    codes[:, -1] = codes[:, 0]
    curves = []
    for layer in layers:
        progress(f"crowd: {layer}")
        for order, last in ORDERS.items():
            found = _measure(layer, keys, codes, counts, last, setting)
            predicted = [_predict(layer, count, setting, last) for count in counts]
            along = Axis("crowd", order, "others", tuple(map(float, counts)))
            claim = "wide keys" if kind(layer) is Kind.EXACT else "expectation"
            for quantity, measured in found.items():
                form = [getattr(one, quantity, None) for one in predicted]
                expected = None if None in form else np.array(form, float)
                curves.append(along.curve(layer, quantity, measured, expected, claim))
    return curves


def _measure(
    layer: str, keys, codes, counts: Sequence[int], last: bool, setting: Setting
) -> dict[str, Float[np.ndarray, "draw point"]]:
    place = np.arange(keys.shape[1])
    target = len(place) - 1 if last else 0
    written = np.array([((place > 0) & (place <= count)) | (place == target) for count in counts])
    shown = np.repeat(keys, len(counts), axis=0)
    script = Script(
        shown,
        np.full(shown.shape[:2], setting.noise),
        np.tile(written, (setting.draws, 1)),
        shown[:, 0],
    )
    found = read(layer, script)
    weights, noises = found.weights, np.full(len(place), setting.noise)
    retention, others = weights[:, target], np.delete(weights, target, axis=1)
    read_out = np.einsum("cw,cwv->cv", weights, np.repeat(codes, len(counts), axis=0))
    nearness = np.einsum("cv,cwv->cw", read_out, np.repeat(codes, len(counts), axis=0))
    nearness = np.where(script.written, nearness, -np.inf)
    error = [
        read_error(own, keys, keys[0], noises) for own, keys in zip(weights, shown, strict=True)
    ]
    quantities = {
        "retention": retention,
        "intrusion": np.sum(others**2, axis=1),
        "accuracy": (np.argmax(nearness, axis=1) == target).astype(float),
        "squared error": np.array(error),
        "stated variance": found.variance,
    }
    return {name: part.reshape(setting.draws, -1) for name, part in quantities.items()}


def _predict(layer: str, others: int, setting: Setting, last: bool) -> Crowded | None:
    width, noise = setting.width, setting.noise
    match kind(layer):
        case Kind.EXACT:
            return exact_crowd(others, width, noise)
        case Kind.RESET:
            gains = reset_gains(others + 1, noise)
        case Kind.COUNTED:
            gains = counted_gains(others + 1, noise)
        case Kind.SUPERPOSED:
            return superposed_crowd(others, width, own_decay(layer), target_last=last)
        case Kind.RESET_ENTRIES:
            return reset_entry_crowd(others, width, noise, target_last=last)
        case _:
            return None
    own = gains[-1:] if last else gains[:1]
    rest = gains[:-1] if last else gains[1:]
    return corrected_crowd(own, rest, width, target_last=last)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
