r"""Judge of reductions: the policy's recurrence, written the textbook way.

Coefficients come from plain evaluations of the design model's own site means and variances, and
the recursion runs in NumPy over the flattened memory, one scalar observation at a time: neither the
derivation nor `inference.policies` takes part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.primitives import Messenger

from design_models import DesignModel
from design_models.policy import Diagonal, Forget, Isotropic, Policy, Reset

from ..claim import Claim, Claimant
from .check import Check
from .joint import THRESHOLD, relative_error

ORACLE = "policy"


class _AtMean(Messenger):
    """Put latent sites at their mean, plus one deviation in one entry; record observed sites."""

    def __init__(self, nudge: tuple[str, int] | None = None) -> None:
        self.nudge = nudge
        self.latents: dict[str, int] = {}
        self.seen: list[Any] = []
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        if msg["is_observed"]:
            self.seen.append((msg["fn"].mean, msg["fn"].variance, msg["value"]))
            return
        mean = msg["fn"].mean
        self.latents[msg["name"]] = mean.size
        if self.nudge is not None and self.nudge[0] == msg["name"]:
            nudged = (
                jnp.ravel(mean)
                .at[self.nudge[1]]
                .add(jnp.ravel(jnp.sqrt(msg["fn"].variance))[self.nudge[1]])
            )
            mean = nudged.reshape(mean.shape)
        msg["value"] = mean


@dataclass(frozen=True)
class Recursion:
    """Means and covariances of the flattened memory after each step, and means read out."""

    means: Float[np.ndarray, "time entry"]
    covariances: Float[np.ndarray, "time entry entry"]
    outputs: Float[np.ndarray, "time output"]


def judge(
    model: DesignModel, policy: Policy, claim: Claimant, inputs: Mapping[str, Array], seen: Array
) -> list[Check]:
    """Compare a reduction's means and covariances at every step with the textbook recursion."""
    return compare(jax.jit(claim)(inputs, seen), recursion(model, policy, inputs, np.asarray(seen)))


def compare(claimed: Claim, right: Recursion) -> list[Check]:
    """Compare what a reduction said with the textbook recursion."""
    errors = {
        "mean": relative_error(claimed.means, right.means),
        "covariance": relative_error(claimed.covariances, right.covariances),
        "read-out mean": relative_error(claimed.output_means, right.outputs),
    }
    return [
        Check(ORACLE, quantity, error, THRESHOLD, "relative error")
        for quantity, error in errors.items()
    ]


def recursion(
    model: DesignModel, policy: Policy, inputs: Mapping[str, Array], seen: np.ndarray
) -> Recursion:
    """Run the textbook recursion over a sequence."""
    prior = _AtMean()
    with handlers.block(), prior:
        memory = model.prior()
    start, unravel = ravel_pytree(memory)
    start = np.asarray(start, float)
    width = jax.tree.leaves(memory)[0].shape[-1]
    columns = _noise_columns(lambda: model.prior(), prior.latents)
    prior_covariance = columns @ columns.T
    mean, covariance = start, prior_covariance
    means, covariances = [], []
    for t in range(len(seen)):
        u = {name: array[t] for name, array in inputs.items()}
        transition, shift, drift = _transition(model, u, unravel, len(start))
        matrix, offset, noise = _observation(model, u, unravel, len(start))
        mean = transition @ mean + shift
        covariance = transition @ covariance @ transition.T + drift
        if isinstance(policy, Forget):
            rate = float(u[policy.rate])
            kept, restored = np.linalg.inv(covariance), np.linalg.inv(prior_covariance)
            precision = rate * kept + (1 - rate) * restored
            information = rate * kept @ mean + (1 - rate) * restored @ start
            mean, covariance = np.linalg.solve(precision, information), np.linalg.inv(precision)
        if isinstance(policy, Isotropic):
            average = np.diag(covariance).reshape(-1, width).mean(axis=1)
            covariance = np.diag(np.repeat(average, width))
        for row, level, variance, value in zip(matrix, offset, noise, seen[t], strict=True):
            if isinstance(policy, Reset):
                touched = row != 0  # entries that this observation sees together
                covariance[touched] = 0
                covariance[touched, touched] = policy.variance
            projected = covariance @ row
            gain = projected / (row @ projected + variance)
            mean = mean + gain * (value - level - row @ mean)
            covariance = _after(policy, covariance, gain, row, variance, width)
        means.append(mean)
        covariances.append(covariance)
    outputs = [_read(model, mean, inputs, t) for t, mean in enumerate(means)]
    return Recursion(np.array(means), np.array(covariances), np.array(outputs))


def _after(policy, covariance, gain, row, variance, width):
    match policy:
        case Diagonal(count):
            count = width if count is None else count
            return np.diag(1 / (1 / np.diag(covariance) + count * row**2 / variance))
        case Isotropic(count):
            count = width if count is None else count
            per_row = (row**2).reshape(-1, width).sum(axis=1) / (width * variance)
            return np.diag(1 / (1 / np.diag(covariance) + count * np.repeat(per_row, width)))
        case _:
            return covariance - np.outer(gain, row @ covariance)


def _transition(model: DesignModel, u, unravel, size: int):
    def moved(state: np.ndarray) -> np.ndarray:
        met = _AtMean()
        with handlers.block(), met:
            result = ravel_pytree(model.transition(unravel(jnp.asarray(state)), u))[0]
        latents.update(met.latents)
        return np.asarray(result, float)

    latents: dict[str, int] = {}
    shift = moved(np.zeros(size))
    matrix = np.stack([moved(unit) - shift for unit in np.eye(size)], axis=1)
    columns = _noise_columns(lambda: model.transition(unravel(jnp.zeros(size)), u), latents, size)
    return matrix, shift, columns @ columns.T


def _observation(model: DesignModel, u, unravel, size: int):
    def seen(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        met = _AtMean()
        with handlers.block(), met:
            model.observe(unravel(jnp.asarray(state)), u)
        means = [np.ravel(np.asarray(mean, float)) for mean, _, _ in met.seen]
        variances = [np.ravel(np.asarray(variance, float)) for _, variance, _ in met.seen]
        return np.concatenate(means), np.concatenate(variances)

    offset, noise = seen(np.zeros(size))
    matrix = np.stack([seen(unit)[0] - offset for unit in np.eye(size)], axis=1)
    return matrix, offset, noise


def _noise_columns(run, latents: Mapping[str, int], size: int = 0) -> np.ndarray:
    """What one deviation of each latent draw adds to the result, one column each."""

    def result(nudge) -> np.ndarray:
        with handlers.block(), _AtMean(nudge):
            return np.asarray(ravel_pytree(run())[0], float)

    centre = result(None)
    nudges = [(name, entry) for name, count in latents.items() for entry in range(count)]
    if not nudges:
        return np.zeros((len(centre), 1))
    return np.stack([result(nudge) - centre for nudge in nudges], axis=1)


def _read(model: DesignModel, mean: np.ndarray, inputs: Mapping[str, Array], t: int) -> np.ndarray:
    with handlers.block(), _AtMean():
        memory = model.prior()
        _, unravel = ravel_pytree(memory)
        u = {name: array[t] for name, array in inputs.items()}
        return np.asarray(ravel_pytree(model.read(unravel(jnp.asarray(mean)), u))[0])
