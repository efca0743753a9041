"""C5: what forgetting buys, the latest value of a key, and what it costs, values left alone.

Layers that take a decay a and a drift q are given a = 0.98 and q = 1 − a², under which the prior
stays as it is, and MesaNet forgets at rate a; the others run as they are.
"""

from collections.abc import Callable, Sequence

import numpy as np

from inference.retrieval import (
    Gains,
    TwoKeys,
    fading_gains,
    forgetting_gains,
    reset_entry_two_keys,
    reset_gains,
    writes_to_overwrite,
)

from .curves import Axis, Curve, Setting
from .kinds import Kind, kind, own_decay
from .readings import Forgetting, gates
from .two_keys import measure, unit_keys

FORGETTING = Forgetting(decay=0.98, drift=1 - 0.98**2)
_WRITES = (1, 2, 4, 8, 16, 32)
WRITTEN = 16
"""How often a value is written before another replaces it."""

_TRIED = 20


def forgetting(
    layers: Sequence[str], setting: Setting, progress: Callable[[str], None]
) -> list[Curve]:
    """C5: gain of a key's n-th write, writes that overwrite a value, retention of one left alone.

    A value is left alone while n others are written with keys orthogonal to its own. A new value
    has overwritten the old where its weight in the read-out is the larger.
    """
    repeated = [TwoKeys(1, n - 1, 1.0, target_last=True) for n in _WRITES]
    alone = [TwoKeys(1, n, 0.0) for n in _WRITES]
    replaced = [TwoKeys(WRITTEN, n, 1.0) for n in range(1, _TRIED + 1)]
    by_writes = Axis("forgetting", "", "writes", _floats(_WRITES))
    by_others = Axis("forgetting", "", "others", _floats(_WRITES))
    by_written = Axis("forgetting", "", "written before", _floats([WRITTEN]))
    curves = []
    for layer in layers:
        progress(f"forgetting: {layer}")
        gains = measure(layer, repeated, setting, FORGETTING)[..., 0]
        kept = measure(layer, alone, setting, FORGETTING)[..., 0]
        old, new = np.moveaxis(measure(layer, replaced, setting, FORGETTING), -1, 0)
        wins = new > old * (1 + 1e-9)
        needed = np.where(wins.any(axis=1), 1.0 + np.argmax(wins, axis=1), np.inf)[:, None]
        curves += [
            by_writes.curve(layer, "gain", gains, _gains(layer, setting.noise), "algebra"),
            by_others.curve(layer, "retention", kept, _kept(layer, setting), "algebra"),
            by_written.curve(
                layer, "writes to overwrite", needed, _needed(layer, setting.noise), "algebra"
            ),
        ]
    return curves


def _floats(numbers: Sequence[int]) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def _fades(layer: str) -> bool:
    """Whether its evidence fades towards the prior: MesaNet's."""
    return "rate" in gates(layer)


def _decay(layer: str) -> float:
    """What the mean of the memory is multiplied by at every write."""
    if own_decay(layer) != 1:
        return own_decay(layer)
    return FORGETTING.decay if "log_decay" in gates(layer) else 1.0


def _all_gains(layer: str, writes: int, noise: float) -> Gains | None:
    """Gains of a key that is written at every step."""
    if _fades(layer):
        return fading_gains(writes, FORGETTING.decay, noise)
    match kind(layer):
        case Kind.EXACT | Kind.COUNTED:
            drift = FORGETTING.drift if "drift" in gates(layer) else 0.0
            return forgetting_gains(writes, _decay(layer), drift, noise)
        case Kind.SUPERPOSED:
            return np.ones(writes)
        case Kind.RESET | Kind.RESET_ENTRIES:
            return reset_gains(writes, noise)
        case _:
            return None


def _gains(layer: str, noise: float) -> np.ndarray | None:
    gains = _all_gains(layer, max(_WRITES), noise)
    return None if gains is None else gains[np.array(_WRITES) - 1]


def _kept(layer: str, setting: Setting) -> np.ndarray | None:
    first, others = 1 / (1 + setting.noise), np.array(_WRITES)
    if _fades(layer):  # the evidence of one write, faded, beside the prior's
        faded = FORGETTING.decay**others
        return faded / (faded + setting.noise)
    match kind(layer):
        case Kind.EXACT | Kind.COUNTED | Kind.RESET:
            return first * _decay(layer) ** others
        case Kind.SUPERPOSED:
            return _decay(layer) ** others
        case Kind.RESET_ENTRIES:
            keys = zip(*unit_keys(0.0, setting), strict=True)
            return np.array(
                [
                    [
                        reset_entry_two_keys(TwoKeys(1, n, 0.0), *pair, setting.noise).target
                        for n in _WRITES
                    ]
                    for pair in keys
                ]
            )
        case _:
            return None


def _needed(layer: str, noise: float) -> np.ndarray | None:
    writes = WRITTEN + _TRIED
    gains, decay = _all_gains(layer, writes, noise), _decay(layer)
    if gains is None or kind(layer) is Kind.RESET_ENTRIES:
        return None
    if _fades(layer):
        gains, kept = np.ones(writes), np.full(writes, FORGETTING.decay)
    elif kind(layer) is Kind.SUPERPOSED:
        kept = np.full(writes, decay)
    else:
        kept = decay * (1 - gains)
    needed = writes_to_overwrite(gains, kept, WRITTEN)
    return None if needed is None else np.array([float(needed)])
