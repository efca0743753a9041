"""Check a recurrence that was derived by hand against the exact filter of its design model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from design_models import ModelError

from . import locations
from .exact_filter import ExactFilter
from .oracles import nuts

STEPS = 6
SEQUENCES = 3
SCALES = (0.1, 10.0, 100.0)
TOLERANCE = 1e-6
"""Largest departure, in posterior standard deviations, that counts as exact."""

Update = Callable[[Any, Array, Mapping[str, Array]], tuple[Any, Array]]
"""(mean, covariance, one step's inputs) -> (mean, covariance) after the step."""


@dataclass(frozen=True)
class UpdateVerdict:
    """Whether a hand-derived update is the exact filter, and where it first is not.

    Args:
        exact: whether it never departs.
        worst: largest departure seen, in posterior standard deviations.
        step: first step at which it departs, from 1; 0 where exact.
        quantity: "mean" or "covariance", the one that departs there.
        departure: by how many posterior standard deviations (of a covariance: relative to the
            product of two).
        standard_errors: the same departure from NUTS on the model, in Monte Carlo standard errors.
        reference: that of the exact filter from the same draws, for comparison.
        steps: steps of each sequence.
        sequences: sequences that were run.
    """

    exact: bool
    worst: float
    step: int = 0
    quantity: str = ""
    departure: float = 0.0
    standard_errors: float = 0.0
    reference: float = 0.0
    steps: int = STEPS
    sequences: int = SEQUENCES

    @property
    def words(self) -> str:
        """The verdict in a sentence."""
        if self.exact:
            return (
                f"exact: over {self.sequences} sequences of {self.steps} steps it departs by at "
                f"most {self.worst:.1e} posterior standard deviations"
            )
        return (
            f"not exact: the {self.quantity} departs at step {self.step} by {self.departure:.3g} "
            f"posterior standard deviations; from NUTS on the model by {self.standard_errors:.1f} "
            f"standard errors (the exact filter: {self.reference:.1f})"
        )


def check_update(exact: ExactFilter, update: Update, *, seed: int = 0) -> UpdateVerdict:
    """Run `update` beside the exact filter, from the prior, on several random sequences.

    Args:
        exact: the derived filter.
        update: `update(mean, covariance, u) -> (mean, covariance)` for one whole step, time and
            observation. The mean has the memory's own shape; the covariance is key×key where all
            rows share one, else over the flattened memory.
        seed: seed of the sequences and the chains.

    Raises:
        ModelError: the update raises, or returns something else than a mean and a covariance.
    """
    with jax.enable_x64(True):
        worst, count = 0.0, 0
        run = jax.jit(exact.run)
        for inputs in _sequences(exact, seed):
            true = run(inputs)
            if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(true)):
                continue  # scaled beyond where the model means anything
            count += 1
            prior = exact.initial()
            mean = exact.memory(prior.mean)
            covariance = exact.shown_covariance(prior.covariance)
            for t in range(STEPS):
                u = {name: array[t] for name, array in inputs.items()}
                mean, covariance = _call(exact, update, mean, covariance, u, t)
                departures = _departures(exact, true, t, mean, covariance)
                worst = max(worst, *departures.values())
                quantity = max(departures, key=lambda name: departures[name])
                if departures["mean"] > TOLERANCE:
                    quantity = "mean"
                if departures[quantity] > TOLERANCE:
                    head = {name: array[: t + 1] for name, array in inputs.items()}
                    own = (mean, covariance)
                    errors = _standard_errors(exact, head, true, t, own, quantity, seed)
                    return UpdateVerdict(
                        False, worst, t + 1, quantity, departures[quantity], *errors, STEPS, count
                    )
        return UpdateVerdict(True, worst, sequences=count)


def _sequences(exact: ExactFilter, seed: int) -> Iterator[dict[str, Array]]:
    """Inputs as the model draws them; then one input at a time scaled, where that is its domain.

    What enters only as an observed value may be anything. Other inputs are scaled where the model
    draws the defaults: its own `inputs` say which values are meant.
    """
    for sequence in range(SEQUENCES):
        yield exact.model.draw_inputs(jax.random.key(seed + sequence), STEPS)
    plain = exact.model.draw_inputs(jax.random.key(seed + SEQUENCES), STEPS)
    coefficients = jax.jit(jax.vmap(exact.coefficients))
    before = jax.tree.leaves(coefficients(plain))
    for name, array in plain.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        for factor in SCALES:
            scaled = plain | {name: factor * array}
            if name == "decay":
                scaled[name] = jnp.minimum(scaled[name], 1.0)
            after = jax.tree.leaves(coefficients(scaled))
            only_seen = all(bool(jnp.all(a == b)) for a, b in zip(before, after, strict=True))
            if only_seen or exact.model.inputs is None:
                yield scaled


def _call(exact: ExactFilter, update: Update, mean, covariance, u, t: int) -> tuple[Any, Array]:
    name = getattr(update, "__name__", "update")
    try:
        result = update(mean, covariance, u)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"`{name}` raised {type(error).__name__}: {reason} ({locations.of_error(error)})."
        ) from error
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ModelError(
            f"`{name}` returned {type(result).__name__}; return the pair (mean, covariance)."
        )
    new_mean, new_covariance = result
    try:
        new_mean = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), new_mean)
        new_covariance = jnp.asarray(new_covariance, float)
    except (TypeError, ValueError) as error:
        raise ModelError(f"`{name}` returned something else than arrays: {error}.") from error
    wanted = [leaf.shape for leaf in jax.tree.leaves(mean)]
    found = [leaf.shape for leaf in jax.tree.leaves(new_mean)]
    if jax.tree.structure(new_mean) != jax.tree.structure(mean) or wanted != found:
        raise ModelError(
            f"`{name}` returned a mean of shapes {found} in {jax.tree.structure(new_mean)}; the "
            f"memory is {wanted} in {jax.tree.structure(mean)}."
        )
    if new_covariance.shape != covariance.shape:
        raise ModelError(
            f"`{name}` returned a covariance of shape {new_covariance.shape}; this filter's is "
            f"{covariance.shape} ({exact.structure.words})"
        )
    for part, arrays in (("mean", jax.tree.leaves(new_mean)), ("covariance", [new_covariance])):
        if not all(bool(jnp.all(jnp.isfinite(array))) for array in arrays):
            raise ModelError(
                f"`{name}` returned a {part} with NaN or infinite entries at step {t + 1}; look "
                "for a division by zero or the root of a negative number."
            )
    return new_mean, new_covariance


def _departures(exact: ExactFilter, true, t: int, mean, covariance) -> dict[str, float]:
    """Largest departures of mean and covariance, in posterior standard deviations."""
    dense = np.asarray(exact.dense_covariance(true.beliefs.covariance[t]))
    deviation = np.sqrt(np.maximum(np.diag(dense), 1e-300))
    true_mean = np.asarray(ravel_pytree(jax.tree.map(lambda leaf: leaf[t], true.means))[0])
    shown = np.asarray(true.covariances[t])
    scale = np.sqrt(np.maximum(np.diag(shown), 1e-300))
    found = {
        "mean": np.max(np.abs(np.asarray(ravel_pytree(mean)[0]) - true_mean) / deviation),
        "covariance": np.max(np.abs(np.asarray(covariance) - shown) / np.outer(scale, scale)),
    }
    return {name: float(value) if np.isfinite(value) else np.inf for name, value in found.items()}


def _standard_errors(
    exact: ExactFilter, inputs, true, t: int, own: tuple[Any, Array], quantity: str, seed: int
) -> tuple[float, float]:
    """Departure of the hand-derived and of the exact belief from NUTS, in standard errors."""
    posterior = nuts.sampler(exact.model)(inputs, exact.observations(inputs), seed)
    handmade = exact.belief(*own)
    scores = []
    for belief in (handmade, jax.tree.map(lambda leaf: leaf[t], true.beliefs)):
        centre = np.asarray(exact.flat(belief.mean))
        error = posterior.memory - centre
        if quantity == "covariance":
            dense = np.asarray(exact.dense_covariance(belief.covariance))
            first, second = np.triu_indices(len(centre))
            error = error[..., first] * error[..., second] - dense[first, second]
        scores.append(float(np.nanmax(np.abs(nuts.scores(error)))))
    return scores[0], scores[1]
