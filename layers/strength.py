r"""A delta rule's memory, written at a strength β instead of at a noise.

With the covariance reset to the identity, the gain k / (‖k‖² + r) is βk at noise r = 1/β − ‖k‖²,
also where a key is shorter than 1. A reset needs no r above 0, only a sum above 0. β up to 2
(negative eigenvalues) writes more than any reading could tell: its variances may be negative.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .memory import Inputs, Prediction, StreamMemory
from .precision import LARGEST_RATIO
from .rules import Exact, Reset
from .scans import Algorithm
from .stream import Belief

WEAKEST = 1e-12
"""Strengths below are taken for it, so that 1/β is finite."""


class StrengthMemory(eqx.Module):
    """A delta rule with inputs `key`, `value`, `query`, `strength` β, and those of `widths`.

    Args:
        value_width: rows of the memory.
        key_width: columns.
        widths: shape at one token of `log_decay`, `drift`, `restoration` and `reset`, where it has
            them. With a drift the covariance is kept: exactly, or as far as a restoration λ says,
            and λ = 0 is the delta rule. Where λ is above 0 noise is kept in the range that float32
            holds. `reset` is σ², in units of the variance that documents start from: noise is
            measured by it, so that it changes nothing at λ = 0.
        algorithm: how sequences are computed; the numbers are the same.
    """

    value_width: int = eqx.field(static=True)
    key_width: int = eqx.field(static=True)
    widths: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True, default=())
    algorithm: Algorithm = eqx.field(static=True, default="chunked")

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {
            "key": (self.key_width,),
            "value": (self.value_width,),
            "query": (self.key_width,),
            "strength": (),
            **dict(self.widths),
        }

    def init_state(self) -> Belief:
        return self._filter().init_state()

    def __call__(self, u, state, *, segment_ids=None, mask=None) -> tuple[Prediction, Any]:
        return self._filter()(_at_noise(u), state, segment_ids=segment_ids, mask=mask)

    def step(self, u, state) -> tuple[Prediction, Any]:
        return self._filter().step(_at_noise(u), state)

    def _filter(self) -> StreamMemory:
        return StreamMemory(
            self.value_width,
            self.key_width,
            Exact() if "drift" in dict(self.widths) else Reset(),
            (("noise", ()), *self.widths),
            algorithm=self.algorithm,
        )


def _at_noise(u: Inputs) -> dict[str, Array]:
    reset = u.get("reset", jnp.ones(()))
    noise = reset * noise_of(u["strength"], u["key"])
    if "drift" in u:
        bounded = jnp.maximum(noise, jnp.maximum(reset, 1) / LARGEST_RATIO)
        noise = jnp.where(u.get("restoration", jnp.ones(())) > 0, bounded, noise)
    return {**{name: array for name, array in u.items() if name != "strength"}, "noise": noise}


def noise_of(strength: Float[Array, "*time"], key: Float[Array, "*time key"]) -> Array:
    """The noise at which a reset memory's gain is `strength` × `key`."""
    squares = jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1)
    return 1 / jnp.maximum(strength.astype(jnp.float32), WEAKEST) - squares


def doubled_sigmoid(logit: Array) -> Array:
    """A strength up to 2, at which a delta rule has negative eigenvalues."""
    return 2 * jax.nn.sigmoid(logit.astype(jnp.float32))
