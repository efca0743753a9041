"""C6: writes of one key that differ in how far they can be trusted, told or not told.

A value of the design model's is written in pairs, a clean write with noise ρ and a noisy one with
20 ρ. Measured: the clean writes' share of the read-out, the mean squared error of the read-out, and
the variance that the layer says it has, where it is told each write's noise; and the squared error
where it is told their mean alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from inference.retrieval import (
    Gains,
    Key,
    entry_weights,
    gain_weights,
    precision_weights,
    read_error,
    reset_entry_weights,
)

from .curves import Axis, Curve, Setting
from .kinds import Kind, kind, own_decay
from .readings import Script, read
from .two_keys import unit_keys

ORDERS = {"clean last": False, "noisy last": True}
NOISIER = 20.0
_PAIRS = (1, 2, 4, 8, 16)


def reliability(
    layers: Sequence[str], setting: Setting, progress: Callable[[str], None]
) -> list[Curve]:
    """C6, with the clean write of each pair last, and with the noisy one last."""
    curves = []
    for layer in layers:
        progress(f"reliability: {layer}")
        for order, noisy_last in ORDERS.items():
            along = Axis("reliability", order, "pairs", tuple(map(float, _PAIRS)))
            found = _measure(layer, noisy_last, setting)
            predicted = _predict(layer, noisy_last, setting)
            curves += [
                along.curve(layer, quantity, measured, predicted.get(quantity), "algebra")
                for quantity, measured in found.items()
            ]
    return curves


def _noises(pairs: int, noisy_last: bool, setting: Setting) -> Gains:
    pair = np.array([NOISIER, 1.0])[:: -1 if noisy_last else 1]
    return setting.noise * np.tile(pair, pairs)


def _measure(
    layer: str, noisy_last: bool, setting: Setting
) -> dict[str, Float[np.ndarray, "draw point"]]:
    noises = _noises(max(_PAIRS), noisy_last, setting)
    written = np.arange(len(noises)) < 2 * np.array(_PAIRS)[:, None]
    key = np.repeat(unit_keys(1.0, setting)[0], len(_PAIRS), axis=0)
    keys = np.repeat(key[:, None], len(noises), axis=1)

    def told(given: Gains):
        cases = np.tile(given, (len(key), 1))
        return read(layer, Script(keys, cases, np.tile(written, (setting.draws, 1)), key))

    def error(weights):
        each = [read_error(own, keys[i], key[i], noises) for i, own in enumerate(weights)]
        return np.array(each)

    known, unknown = told(noises), told(np.full_like(noises, noises.mean()))
    clean = known.weights[:, noises == setting.noise].sum(axis=1)
    quantities = {
        "clean share": clean / known.weights.sum(axis=1),
        "squared error": error(known.weights),
        "stated variance": known.variance,
        "squared error, not told": error(unknown.weights),
    }
    return {name: part.reshape(setting.draws, -1) for name, part in quantities.items()}


def _predict(
    layer: str, noisy_last: bool, setting: Setting
) -> dict[str, Float[np.ndarray, "draw point"]]:
    if kind(layer) is Kind.DIAGONAL:
        return {}
    found: dict[str, list[list[float]]] = {}
    for key in unit_keys(1.0, setting)[0]:
        line: dict[str, list[float]] = {}
        for pairs in _PAIRS:
            noises = _noises(pairs, noisy_last, setting)
            keys = np.tile(key, (len(noises), 1))
            told = _weights(layer, key, noises)
            mean = _weights(layer, key, np.full_like(noises, noises.mean()))
            clean = noises == setting.noise
            line.setdefault("clean share", []).append(float(told[clean].sum() / told.sum()))
            line.setdefault("squared error", []).append(read_error(told, keys, key, noises))
            line.setdefault("squared error, not told", []).append(
                read_error(mean, keys, key, noises)
            )
            if kind(layer) in (Kind.EXACT, Kind.COUNTED):
                line.setdefault("stated variance", []).append(1 / (1 + float(np.sum(1 / noises))))
        for quantity, numbers in line.items():
            found.setdefault(quantity, []).append(numbers)
    return {quantity: np.array(numbers) for quantity, numbers in found.items()}


def _weights(layer: str, key: Key, noises: Gains) -> Gains:
    match kind(layer):
        case Kind.EXACT | Kind.COUNTED:
            return precision_weights(noises)
        case Kind.RESET:
            return gain_weights(1 / (1 + noises))
        case Kind.SUPERPOSED:
            return own_decay(layer) ** np.arange(len(noises))[::-1]
        case Kind.ENTRIES:
            return entry_weights(key, noises)
        case _:
            return reset_entry_weights(key, noises)
