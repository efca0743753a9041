"""How a memory falls apart into independent blocks, and which rows share one covariance.

Two entries of the memory belong to one block when a transition, a noise, the prior or an
observation ties them together. Blocks with equal coefficients are filtered together as rows of
one block: they have one covariance and differ only in their means. This turns a dense filter on
value*key entries into the one K×K covariance of a linear memory, or into scalars.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from .linear_gaussian import Evidence, Observation, Step

Index = Int[np.ndarray, "_ _ _"]
"""Positions, by block, row and column."""
Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""States, evidence and observations of one component."""

TOLERANCE = 1e-10
"""Relative difference of two entries that counts as none."""
ROUNDING = 1e-13
"""Entries below this, relative to the largest of their matrix, count as zero."""


@dataclass(frozen=True)
class Partition:
    """Positions in the flattened memory, evidence and observation of each block's rows."""

    states: Int[np.ndarray, "block row width"]
    evidence: Int[np.ndarray, "block row evidence"] | None
    observed: Int[np.ndarray, "block row observed"] | None

    def __post_init__(self) -> None:
        # JAX remembers an int64 index as such, and then fails where float64 is not enabled.
        for name in ("states", "evidence", "observed"):
            positions = getattr(self, name)
            if positions is not None:
                object.__setattr__(self, name, positions.astype(np.int32))

    @property
    def blocks(self) -> int:
        return self.states.shape[0]

    @property
    def rows(self) -> int:
        return self.states.shape[1]

    @property
    def width(self) -> int:
        return self.states.shape[2]


def undivided(states: int, evidence: int, observed: int) -> Partition:
    """One block of one row: the dense filter."""

    def all_of(count: int) -> Index | None:
        return np.arange(count).reshape(1, 1, count) if count else None

    return Partition(np.arange(states).reshape(1, 1, states), all_of(evidence), all_of(observed))


def divide(whole: Step, partition: Partition) -> Step:
    """Coefficients of an undivided memory (draw, 1, ...) in the blocks of a partition."""
    places: dict[str, Any] = {
        "states": partition.states,
        "evidence": partition.evidence,
        "observed": partition.observed,
    }

    def matrix(array: Any, rows: str, columns: str) -> Array:
        first, second = places[rows][:, 0], places[columns][:, 0]  # the rows of a block are alike
        return jnp.asarray(np.asarray(array)[:, 0, first[..., :, None], second[..., None, :]])

    def shift(array: Any, rows: str) -> Array:
        return jnp.asarray(np.asarray(array)[:, 0, 0, places[rows]])

    evidence, observation = whole.evidence, whole.observation
    return Step(
        matrix(whole.transition, "states", "states"),
        shift(whole.shift, "states"),
        matrix(whole.drift, "states", "states"),
        evidence
        and Evidence(
            matrix(evidence.observation, "evidence", "states"),
            shift(evidence.shift, "evidence"),
            matrix(evidence.noise, "evidence", "evidence"),
            matrix(evidence.cross, "states", "evidence"),
        ),
        observation
        and Observation(
            matrix(observation.observation, "observed", "states"),
            shift(observation.shift, "observed"),
            matrix(observation.noise, "observed", "observed"),
        ),
    )


def discover(coefficients: Mapping[str, Any]) -> Partition:
    """Find the partition of a model from dense coefficients at several generic inputs.

    Args:
        coefficients: `prior`, `transition`, `drift` (draw, state, state), `evidence`,
            `evidence_noise`, `cross`, `observation`, `noise`, dense, with a leading axis of draws;
            None where the model has no evidence or no observation.

    Returns:
        The finest partition that all draws admit.
    """
    states = coefficients["transition"].shape[-1]
    seen = {name: coefficients[name] for name in ("evidence", "observation")}
    counts = {name: 0 if matrix is None else matrix.shape[-2] for name, matrix in seen.items()}
    whole = undivided(states, counts["evidence"], counts["observation"])
    labels = _components(coefficients, states, counts)
    if labels is None:
        return whole
    parts = []
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        own_states = members[members < states]
        rest = members[members >= states] - states
        own_evidence = rest[rest < counts["evidence"]]
        own_observed = rest[rest >= counts["evidence"]] - counts["evidence"]
        parts.append((own_states, own_evidence, own_observed))
    if len({tuple(len(indices) for indices in part) for part in parts}) != 1:
        return whole
    members = _alike(parts, coefficients)
    if len({len(group) for group in members}) != 1:
        members = [[part] for part in parts]

    states_of, evidence_of, observed_of = (
        np.array([[part[position] for part in group] for group in members]) for position in range(3)
    )
    return Partition(
        states_of,
        evidence_of if evidence_of.size else None,
        observed_of if observed_of.size else None,
    )


def _components(coefficients, states: int, counts: dict[str, int]) -> np.ndarray | None:
    """Label states, evidence and observations by the component they belong to."""
    size = states + sum(counts.values())
    tied = np.zeros((size, size), bool)
    evidence = slice(states, states + counts["evidence"])
    observed = slice(states + counts["evidence"], size)
    memory = slice(0, states)
    places = {
        "prior": (memory, memory),
        "transition": (memory, memory),
        "drift": (memory, memory),
        "evidence": (evidence, memory),
        "evidence_noise": (evidence, evidence),
        "cross": (memory, evidence),
        "observation": (observed, memory),
        "noise": (observed, observed),
    }
    for name, place in places.items():
        if coefficients[name] is not None:
            tied[place] |= _nonzero(coefficients[name])
    _, labels = connected_components(csr_matrix(tied | tied.T), directed=False)
    if any(np.all(np.flatnonzero(labels == label) >= states) for label in range(labels.max() + 1)):
        return None  # an observation that touches no state: keep it with the rest
    return labels


def _nonzero(matrix: np.ndarray) -> np.ndarray:
    return np.any(np.abs(matrix) > ROUNDING * _scale(matrix), axis=0)


def _scale(matrix: np.ndarray) -> np.ndarray:
    return np.max(np.abs(matrix), axis=(-2, -1), keepdims=True, initial=0)


def _alike(parts: list[Part], coefficients) -> list[list[Part]]:
    """Group components whose coefficients are equal in every draw, in order of appearance."""
    groups: list[list[Part]] = []
    examples: list[np.ndarray] = []
    # In units of each matrix's largest entry: whatever units the memory is in, blocks are alike
    # or not.
    scaled = {
        name: None if matrix is None else matrix / np.maximum(_scale(matrix), 1e-300)
        for name, matrix in coefficients.items()
    }
    for part in parts:
        own = _coefficients_of(scaled, *part)
        for group, example in zip(groups, examples, strict=True):
            if np.all(np.abs(own - example) <= TOLERANCE * np.abs(example) + ROUNDING):
                group.append(part)
                break
        else:
            groups.append([part])
            examples.append(own)
    return groups


def _coefficients_of(coefficients, states, evidence, observed) -> np.ndarray:
    own = {
        "prior": (states, states),
        "transition": (states, states),
        "drift": (states, states),
        "evidence": (evidence, states),
        "evidence_noise": (evidence, evidence),
        "cross": (states, evidence),
        "observation": (observed, states),
        "noise": (observed, observed),
    }
    return np.concatenate(
        [
            np.ravel(coefficients[name][:, rows[:, None], columns[None, :]])
            for name, (rows, columns) in own.items()
            if coefficients[name] is not None
        ]
    )
