"""Shapes, rules and streams that tests and benchmarks of the scans share."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from layers.rules import Additive, Diagonal, Exact, Forget, Isotropic, Reset, Restored
from layers.stream import Stream

Rate = Literal["none", "scalar", "key"]

LENGTHS = (0, 1, 15, 16, 17, 64, 65, 150)
"""Around the edges of a block (16) and of a chunk (64)."""

RULES = {
    "exact": lambda time: Exact(),
    "reset": lambda time: Reset(0.8),
    "restored 0": lambda time: Restored(jnp.asarray(0.0), jnp.asarray(0.8)),
    "restored 0.3": lambda time: Restored(jnp.asarray(0.3), jnp.asarray(0.8)),
    "restored 1": lambda time: Restored(jnp.asarray(1.0), jnp.asarray(0.8)),
    "restored by token": lambda time: Restored(
        jnp.asarray(np.linspace(0, 1, time)), jnp.asarray(np.linspace(0.8, 0.5, time))
    ),
    "additive": lambda time: Additive(),
    "diagonal": lambda time: Diagonal(),
    "isotropic": lambda time: Isotropic(1.0),
    "forget": lambda time: Forget(),
}
"""Every rule, for a sequence of a given length."""


@dataclass(frozen=True)
class Case:
    """What a stream is made of.

    Args:
        time: tokens.
        key: key width.
        value: value width.
        decay: none, one number a token, or one per key.
        drift: alike.
        starts: tokens at which documents start.
        observations: pairs written a token.
        rate: whether the stream carries `Forget`'s rate.
        weakest: the strongest log decay of a token, at most 0.
    """

    time: int
    key: int = 5
    value: int = 3
    decay: Rate = "none"
    drift: Rate = "none"
    starts: tuple[int, ...] = ()
    observations: int = 1
    rate: bool = False
    weakest: float = -0.3


def draw_stream(case: Case, seed: int = 0, dtype: str = "float64") -> Stream:
    """A stream of unit keys that often resemble each other, drawn by NumPy."""
    rng = np.random.default_rng(seed)
    several = () if case.observations == 1 else (case.observations,)
    widths = {"scalar": (case.time,), "key": (case.time, case.key)}
    key = rng.normal(size=(case.time, *several, case.key)) + 1
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    parts = {
        "key": key,
        "value": rng.normal(size=(case.time, *several, case.value)),
        "query": rng.normal(size=(case.time, case.key)),
        "noise": rng.uniform(0.1, 1, size=(case.time, *several)),
    }
    if case.decay != "none":
        parts["log_decay"] = rng.uniform(case.weakest, 0, size=widths[case.decay])
    if case.drift != "none":
        parts["drift"] = rng.uniform(0, 0.2, size=widths[case.drift])
    if case.rate:
        parts["rate"] = rng.uniform(0.7, 1, size=case.time)
    arrays = {name: jnp.asarray(part, dtype) for name, part in parts.items()}
    starts = np.isin(np.arange(case.time), case.starts) if case.starts else None
    return Stream(**arrays, starts=None if starts is None else jnp.asarray(starts))


def draw_initial(rule: object, key: int, value: int, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Mean and covariance of a belief in the middle of a sequence, as `rule` keeps it."""
    rng = np.random.default_rng(seed)
    mean = 0.5 * rng.normal(size=(value, key))
    match rule:
        case Reset():
            return (mean,)
        case Isotropic():
            return mean, np.array(0.7)
        case Diagonal() | Additive():
            return mean, rng.uniform(0.3, 1, size=key)
    factor = rng.normal(size=(key, key)) / np.sqrt(key)
    return mean, factor @ factor.T + 0.3 * np.eye(key)
