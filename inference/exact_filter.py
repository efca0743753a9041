"""The exact filter of a design model, ready to run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from design_models import DesignModel, ModelError
from design_models.policy import Exact, Policy

from .admission import admission, check_inputs
from .extraction import (
    affine_map,
    arrange_observed,
    draws_size,
    observed_values,
    prior_belief,
    step_coefficients,
)
from .kalman import advance, advance_factor, factorise, predict
from .linear_gaussian import Belief, Observed, Step
from .partition import Partition
from .policies import advance_under
from .proof import Proof
from .structure import Structure


class Prediction(eqx.Module):
    """What a read-out says: Gaussian, entry by entry; the mean is the layer's output."""

    mean: Float[Array, "*time output"]
    variance: Float[Array, "*time output"]


class Filtered(eqx.Module):
    """A filtered sequence.

    Args:
        means: after each step, in the memory's own shape with a leading time axis.
        covariances: (time, key, key) where all rows share one, else over the flattened memory.
        predictions: the read-out after each step.
        log_evidence: log density of each step's observations given those before.
        beliefs: the same means and covariances in blocks.
    """

    means: Any
    covariances: Float[Array, "time state state"]
    predictions: Prediction
    log_evidence: Float[Array, " time"]
    beliefs: Belief

    @property
    def outputs(self) -> Float[Array, "time output"]:
        return self.predictions.mean

    @property
    def output_variances(self) -> Float[Array, "time output"]:
        return self.predictions.variance


@dataclass(frozen=True, eq=False)
class ExactFilter:
    """The exact Kalman filter derived from a design model.

    Made by `inference.derive`. `run` filters a sequence; `initial`, `coefficients`, `update`,
    `read` are its parts, for one step.
    """

    model: DesignModel
    proof: Proof
    partition: Partition
    structure: Structure
    examples: Mapping[str, Array]

    # -- one step ----------------------------------------------------------------------------

    def initial(self) -> Belief:
        """The prior belief."""
        return prior_belief(self.proof, self.partition)

    def coefficients(self, u: Mapping[str, Array]) -> Step:
        """One step's coefficients in blocks."""
        return step_coefficients(self.proof, self.partition, u)

    def observed(self, u: Mapping[str, Array]) -> Observed:
        """One step's observed values as `u` gives them."""
        return arrange_observed(self.partition, *observed_values(self.proof, u))

    def update(self, belief: Belief, u: Mapping[str, Array]) -> Belief:
        """One exact step: predict, then absorb what `u` says was observed."""
        return advance(belief, self.coefficients(u), self.observed(u))[0]

    def read(self, belief: Belief, u: Mapping[str, Array]) -> Prediction:
        r"""Predict the read-out, entry by entry: $N(H m + h,\; \mathrm{diag}(H P H^\top + R))$."""
        run = affine_map(self.proof.readout, self.proof.memory, u)
        draws = jnp.zeros(draws_size(self.proof.readout), float)
        state = self.flat(belief.mean)
        mean, linear = jax.linearize(lambda *given: run(*given)[0], state, draws)
        transpose = jax.linear_transpose(linear, state, draws)
        rows, noise = jax.vmap(transpose)(jnp.eye(mean.size))
        blocks = rows[:, self.partition.states]
        variance = jnp.einsum("obri,bij,obrj->o", blocks, belief.covariance, blocks)
        variance += jnp.sum(noise**2, axis=-1)
        return Prediction(mean, variance)

    # -- sequences ---------------------------------------------------------------------------

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        policy: Policy | None = None,
        form: Literal["covariance", "factor"] = "covariance",
        observed: Float[Array, "time seen"] | None = None,
    ) -> Filtered:
        """Filter a sequence.

        Args:
            inputs: arrays with a leading time axis.
            policy: what is done to the covariance before each write; exact where left out.
            form: "factor" carries a square root of the covariance (the reference, exact policy).
            observed: values to condition on in place of those in `inputs`: for each step, every
                observed site of `transition`, then of `observe`, flattened.

        Raises:
            ModelError: `form="factor"` with a policy other than exact; or a site's parameter is
                not finite or outside its constraint at some step (not seen while JAX traces).
        """
        self.check(inputs, observed)
        policy = Exact() if policy is None else policy
        if form == "factor" and not isinstance(policy, Exact):
            raise ModelError("`form` is 'factor'; that form is for the exact policy only.")
        if (policy, form) not in self._compiled:
            self._compiled[policy, form] = jax.jit(partial(self._filter, policy, form))
        return self._compiled[policy, form](dict(inputs), observed)

    @cached_property
    def _compiled(self) -> dict[tuple[Policy, str], Callable[..., Filtered]]:
        return {}

    def _filter(
        self,
        policy: Policy,
        form: str,
        inputs: Mapping[str, Array],
        observed: Float[Array, "time seen"] | None,
    ) -> Filtered:
        steps = jax.vmap(self.coefficients)(inputs)
        values = self.observations(inputs) if observed is None else observed
        split = sum(site.size for site in self.proof.transition.observed)
        arranged = jax.vmap(lambda y: arrange_observed(self.partition, y[:split], y[split:]))(
            values
        )
        prior = self.initial()
        start = factorise(prior) if form == "factor" else prior

        def body(belief, moment):
            step, seen, u = moment
            if form == "factor":
                belief, added = advance_factor(belief, step, seen)
            else:
                belief, added = advance_under(policy, belief, prior, step, seen, u)
            plain = Belief(belief.mean, belief.covariance)
            return belief, (plain, added)

        _, (beliefs, log_evidence) = jax.lax.scan(body, start, (steps, arranged, inputs))
        predictions = jax.vmap(self.read)(beliefs, inputs)
        return Filtered(
            jax.vmap(self.memory)(beliefs.mean),
            jax.vmap(self.shown_covariance)(beliefs.covariance),
            predictions,
            log_evidence,
            beliefs,
        )

    def absorb(self, inputs: Mapping[str, Array], policy: Policy | None = None) -> Belief:
        """Only the belief after the last step: `run` without what it keeps of every step.

        Raises:
            ModelError: as `run`.
        """
        self.check(inputs)
        prior = self.initial()
        chosen = Exact() if policy is None else policy

        def body(belief, u):
            step, seen = self.coefficients(u), self.observed(u)
            return advance_under(chosen, belief, prior, step, seen, u)[0], None

        return jax.lax.scan(body, prior, dict(inputs))[0]

    def observations(self, inputs: Mapping[str, Array]) -> Float[Array, "time seen"]:
        """Every step's observed values as the inputs give them, flattened in the order of sites."""
        return jax.vmap(lambda u: jnp.concatenate(observed_values(self.proof, u)))(dict(inputs))

    def forecast(self, belief: Belief, inputs: Mapping[str, Array]) -> tuple[Belief, Prediction]:
        """Beliefs and read-outs at later steps when nothing more is observed.

        Raises:
            ModelError: as `run`.
        """
        check_inputs(self.proof, self._admission, inputs, values_are_used=False)

        def body(belief, u):
            belief = predict(belief, self.coefficients(u))
            return belief, (belief, self.read(belief, u))

        return jax.lax.scan(body, belief, dict(inputs))[1]

    def check(
        self, inputs: Mapping[str, Array], observed: Float[Array, "time seen"] | None = None
    ) -> None:
        """Refuse inputs at which the model has no density at some step.

        Inside `jax.jit` and other transformations values are unknown, and nothing is checked.

        Raises:
            ModelError: with function, site, step, parameter and its value.
        """
        check_inputs(self.proof, self._admission, inputs, values_are_used=observed is None)
        if observed is None or isinstance(observed, Tracer):
            return
        missing = ~np.isfinite(observed).all(axis=-1)
        if missing.any():
            raise ModelError(
                f"`observed` is not finite at step {np.argmax(missing) + 1}; give a missing entry "
                "a large noise variance."
            )

    @cached_property
    def _admission(self) -> Any:
        return admission(self.proof)

    # -- shapes ------------------------------------------------------------------------------

    @cached_property
    def shares_rows(self) -> bool:
        """Whether all rows of a (value, key) memory share one key×key covariance."""
        return self.structure.kind == "shared rows"

    def memory(self, mean: Float[Array, "block row width"]) -> Any:
        """Block means in the memory's own shape."""
        template = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, mean.dtype), self.proof.memory)
        return ravel_pytree(template)[1](self.flat(mean))

    def flat(self, mean: Float[Array, "block row width"]) -> Float[Array, " entry"]:
        """Block means as the flattened memory."""
        return jnp.zeros(mean.size, mean.dtype).at[self.partition.states].set(mean)

    def dense_covariance(
        self, covariance: Float[Array, "block width width"]
    ) -> Float[Array, "entry entry"]:
        """Covariance of the flattened memory: for small memories."""
        states = self.partition.states
        repeated = jnp.broadcast_to(covariance[:, None], (*states.shape, states.shape[-1]))
        size = states.size
        dense = jnp.zeros((size, size), covariance.dtype)
        return dense.at[states[..., :, None], states[..., None, :]].set(repeated)

    def shown_covariance(
        self, covariance: Float[Array, "block width width"]
    ) -> Float[Array, "state state"]:
        """Key×key where all rows share one covariance, else over the flattened memory."""
        return covariance[0] if self.shares_rows else self.dense_covariance(covariance)

    def belief(self, memory: Any, covariance: Float[Array, "state state"]) -> Belief:
        """A belief from a mean in the memory's shape and a covariance as `run` shows it."""
        flat, _ = ravel_pytree(memory)
        states = self.partition.states
        if self.shares_rows:
            return Belief(flat[states], covariance[None])
        first = states[:, 0]
        return Belief(flat[states], covariance[first[..., :, None], first[..., None, :]])
