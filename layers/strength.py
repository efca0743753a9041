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
        widths: shape at one token of `log_decay`, `drift` or `stationary`, `restoration` and
            `reset`, where it has them. With a drift q, or a `stationary` variance p, which means
            q = (1 − a²) p, the covariance is kept: exactly, or as far as a restoration λ says, and
            λ = 0 is the delta rule. Where λ is above 0 noise is kept in the range that float32
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
        return self._filter()(filter_inputs(u), state, segment_ids=segment_ids, mask=mask)

    def step(self, u, state) -> tuple[Prediction, Any]:
        return self._filter().step(filter_inputs(u), state)

    def _filter(self) -> StreamMemory:
        named = dict(self.widths)
        if "stationary" in named:
            named["drift"] = named.pop("stationary")
        return StreamMemory(
            self.value_width,
            self.key_width,
            Exact() if "drift" in named else Reset(),
            (("noise", ()), *named.items()),
            algorithm=self.algorithm,
        )


def filter_inputs(u: Inputs) -> dict[str, Array]:
    """What the filter itself is given: noise for strengths, drift for stationary variances."""
    given = dict(u)
    reset = given.get("reset", jnp.ones(()))
    noise = reset * noise_of(given.pop("strength"), given["key"])
    if "stationary" in given:
        given["drift"] = -jnp.expm1(2 * given["log_decay"]) * given.pop("stationary")
    if "drift" in given:
        bounded = jnp.maximum(noise, jnp.maximum(reset, 1) / LARGEST_RATIO)
        noise = jnp.where(given.get("restoration", jnp.ones(())) > 0, bounded, noise)
    return given | {"noise": noise}


def noise_of(strength: Float[Array, "*time"], key: Float[Array, "*time key"]) -> Array:
    """The noise at which a reset memory's gain is `strength` × `key`."""
    squares = jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1)
    return 1 / jnp.maximum(strength.astype(jnp.float32), WEAKEST) - squares


def doubled_sigmoid(logit: Array) -> Array:
    """A strength up to 2, at which a delta rule has negative eigenvalues."""
    return 2 * jax.nn.sigmoid(logit.astype(jnp.float32))
