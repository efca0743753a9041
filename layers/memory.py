"""Memories: filters over named inputs, for one head, with a state to carry on from."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .packing import at_padding, document_starts, without_padding
from .precision import MeanDtype
from .rules import Exact, Forget, Restored, Rule
from .scans import Algorithm, filter_scan, initial_belief
from .sharded import SEQUENCE, rule_refusal, sharded_scan, split_axis
from .stream import Belief, Reading, Stream

Inputs = Mapping[str, Array]


class Prediction(eqx.Module):
    """What a memory predicts at each token: Gaussian, entry by entry.

    Args:
        mean: the read-out, which is the layer's output.
        variance: how unsure the memory is of every entry of the mean.
        value_variance: variance of a new value seen along the query: `variance` plus the noise.
        log_evidence: log density of the token's values given all before: a measure of surprise.
    """

    mean: Float[Array, "*time value"]
    variance: Float[Array, "*time"] | Float[Array, "*time value"]
    value_variance: Float[Array, "*time"] | Float[Array, "*time value"]
    log_evidence: Float[Array, "*time"]


@runtime_checkable
class Memory(Protocol):
    """One head's filter. `inputs` gives every input's shape at one token."""

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def value_width(self) -> int: ...

    def init_state(self) -> Any:
        """The state before the first token: a pytree of arrays."""
        ...

    def __call__(
        self,
        u: Inputs,
        state: Any,
        *,
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Prediction, Any]:
        """Predictions at every token, and the state after the last."""
        ...

    def step(self, u: Inputs, state: Any) -> tuple[Prediction, Any]:
        """One token: the same numbers as the full pass."""
        ...


class StreamMemory(eqx.Module):
    r"""A memory whose inputs are those of `layers.Stream`, by name.

    Inputs a token: `key`, `value`, `query`, and any of `noise` r (default 1), `log_decay` log a,
    `drift` q, `rate` γ (for `Forget`), `restoration` λ (which makes the rule `Restored`, and reads
    `reset` σ², else the prior variance), and `step` Δ: then time is continuous, decay, drift and
    noise are rates, and a write counts Δ times.

    Where `jax.set_mesh` names a mesh with an axis "sequence", time is split over its devices.

    Where covariances are kept, noise must be at least `prior_variance` × ‖key‖² divided by
    `layers.precision.LARGEST_RATIO`, as `links.bounded_noise` makes it; drift may be of any size.

    Args:
        value_width: rows of the memory.
        key_width: columns.
        rule: what is done to the covariance.
        widths: shape at one token of every input that is not a key, value or query.
        observations: pairs written a token.
        prior_variance: of every entry, where documents start.
        algorithm: how sequences are computed; the numbers are the same.
        dtype: of the operands of products that carry values.
    """

    value_width: int = eqx.field(static=True)
    key_width: int = eqx.field(static=True)
    rule: Rule = eqx.field(static=True, default=Exact())
    widths: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True, default=())
    observations: int = eqx.field(static=True, default=1)
    prior_variance: float = eqx.field(static=True, default=1.0)
    algorithm: Algorithm = eqx.field(static=True, default="chunked")
    dtype: MeanDtype = eqx.field(static=True, default="float32")

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        several = () if self.observations == 1 else (self.observations,)
        return {
            "key": (*several, self.key_width),
            "value": (*several, self.value_width),
            "query": (self.key_width,),
            **dict(self.widths),
        }

    def init_state(self) -> Belief:
        return initial_belief(self.rule, self.value_width, self.key_width, self.prior_variance)

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        stream, rule = self._stream(u), self._rule(u)
        if segment_ids is not None:
            stream = replace(stream, starts=document_starts(segment_ids, mask))
        if mask is not None:
            stream = without_padding(stream, mask)
            if isinstance(rule, Restored):
                rule = replace(rule, restoration=at_padding(rule.restoration, mask, 1))
        scan = sharded_scan if split_axis(SEQUENCE) and rule_refusal(rule) is None else filter_scan
        state, reading = scan(
            stream,
            self.prior_variance,
            rule,
            initial=state,
            algorithm=self.algorithm,
            dtype=self.dtype,
        )
        return silent_at_padding(predict(reading, stream.noise), mask), state

    def step(self, u, state):
        u = {name: array[None] for name, array in u.items()}
        stream = self._stream(u)
        state, reading = filter_scan(
            stream, self.prior_variance, self._rule(u), initial=state, algorithm="token"
        )
        prediction = predict(reading, stream.noise)
        return jax.tree.map(lambda part: part[0], prediction), state

    def _rule(self, u: Inputs) -> Rule:
        if "restoration" not in u:
            return self.rule
        return Restored(u["restoration"], u.get("reset", self.prior_variance))

    def _stream(self, u: Inputs) -> Stream:
        count = () if self.observations == 1 else (self.observations,)
        noise = u.get("noise", jnp.ones((*u["query"].shape[:1], *count), u["key"].dtype))
        rate = u.get("rate") if isinstance(self.rule, Forget) else None
        value, log_decay, drift = u["value"], u.get("log_decay"), u.get("drift")
        if "step" in u:
            step = u["step"]
            value, noise = value * step[:, None], noise * step
            log_decay, drift = (
                None if part is None else part * step.reshape(-1, *[1] * (part.ndim - 1))
                for part in (log_decay, drift)
            )
        return Stream(u["key"], value, u["query"], noise, log_decay, drift, rate=rate)


def silent_at_padding(prediction: Prediction, mask: Bool[Array, " time"] | None) -> Prediction:
    """Zeros at padding."""
    if mask is None:
        return prediction
    return jax.tree.map(lambda part: at_padding(part, mask, 0), prediction)


def predict(reading: Reading, noise: Float[Array, "*time_and_observation"]) -> Prediction:
    """A reading with the variance of a new value, seen with the token's last noise."""
    last = noise if noise.ndim == 1 else noise[:, -1]
    return Prediction(reading.mean, reading.variance, reading.variance + last, reading.log_evidence)
