"""What kind of filter was derived, in words, and what it can be compiled to."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from .linear_gaussian import Step
from .partition import Partition

Kind = Literal["shared rows", "separate rows", "scalar", "diagonal", "blocks", "dense"]
MatrixKind = Literal["zero", "identity", "scalar", "diagonal", "dense"]


@dataclass(frozen=True)
class Structure:
    """The structure of a derived filter.

    Args:
        kind: "shared rows" (one key×key covariance), "separate rows" (one for each row), "scalar"
            (one variance), "diagonal" (a variance per column or entry), "blocks", "dense".
        words: the same in a sentence.
        transition: shape of the matrix F that moves a row.
        drift: shape of the process noise Q of a row.
        evidence: numbers observed about the change, per row and step.
        observations: numbers observed about the memory, per row and step.
        shifted: whether means are shifted by the transition or the observation.
        evidence_sees_memory: whether what is observed about the change depends on the memory too.
    """

    kind: Kind
    words: str
    transition: MatrixKind
    drift: MatrixKind
    evidence: int
    observations: int
    shifted: bool
    evidence_sees_memory: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Compiled paths that a filter of this structure qualifies for, slowest first."""
        if self._superposes:
            return ("token", "chunked", "parallel")
        if self.kind != "shared rows":
            return ("token", "parallel")
        if self.transition == "dense" or self.drift == "dense" or self.evidence or self.shifted:
            return ("token", "parallel")
        return ("token", "chunked", "parallel")

    @property
    def _superposes(self) -> bool:
        """Whether evidence moves the mean of each entry by what does not depend on the memory."""
        alone = self.kind in ("scalar", "diagonal") and not self.shifted
        about_change = self.evidence == 1 and not self.evidence_sees_memory
        return alone and about_change and self.observations == 0

    @property
    def why_paths(self) -> str:
        """Why these paths and no others."""
        if self._superposes:
            return (
                "evidence is about the change of each entry alone, so writes add up: where they "
                "are the outer product of `value` and a key, matrix products within chunks of "
                "tokens, which may be combined in parallel"
            )
        if "chunked" in self.paths:
            return (
                "rows share one covariance, and decay and drift act on keys one by one: matrix "
                "products within chunks of tokens, which may be combined in parallel"
            )
        if self.kind in ("scalar", "diagonal"):
            return "entries are filtered one by one: an elementwise scan, parallel in time"
        if self.kind == "shared rows":
            reason = (
                "evidence is about the change"
                if self.evidence
                else "means are shifted"
                if self.shifted
                else "keys are mixed by the transition or the drift"
            )
            return f"{reason}, so the chunked form does not apply"
        return "no covariance is shared by the rows, so the general filter is used"


_TOLERANCE = 1e-9
_ROUNDING = 1e-13


def describe(
    memory: Any, partition: Partition, steps: Step, prior: Float[np.ndarray, "entry entry"]
) -> Structure:
    """Describe a derived filter.

    Args:
        memory: shapes of the memory, a pytree.
        partition: its blocks.
        steps: coefficients in these blocks at generic inputs.
        prior: covariance of the flattened memory.
    """
    evidence = steps.evidence
    spread = float(np.max(np.abs(prior)))
    kind, words = _kind(memory, partition)
    return Structure(
        kind,
        words,
        matrix_kind(steps.transition),
        # A deviation is zero beside that of the prior, a variance beside its square.
        matrix_kind(steps.drift, zero=_ROUNDING**2 * (spread or 1.0)),
        0 if partition.evidence is None else partition.evidence.shape[-1],
        0 if partition.observed is None else partition.observed.shape[-1],
        _shifted(steps, spread),
        evidence is not None and bool(np.any(np.abs(evidence.observation) > _ROUNDING)),
    )


def with_choices(structure: Structure, places: tuple[str, ...]) -> Structure:
    """Say in words where the inputs choose among cases, all of which have this structure."""
    if not places:
        return structure
    known = [place for place in places if place]
    where = f" (at {', '.join(known)})" if known else ""
    words = f"{structure.words} This holds whatever the inputs choose{where}."
    return replace(structure, words=words)


def without_claims(structure: Structure) -> Structure:
    """The structure of an undivided memory whose coefficients are not shown to have any."""
    words = f"{structure.words} What the inputs choose is not followed, so no structure is claimed."
    return replace(structure, words=words, transition="dense", drift="dense", shifted=True)


def matrix_kind(matrices: Array, zero: float = _ROUNDING) -> MatrixKind:
    """Kind of a stack of square matrices: the most special one that all of them have.

    Args:
        matrices: the stack.
        zero: largest entry of a matrix that counts as zero.
    """
    stack = np.asarray(matrices)
    identity = np.eye(stack.shape[-1])
    scale = np.max(np.abs(stack), axis=(-2, -1), keepdims=True, initial=0)

    def close(other: np.ndarray) -> bool:
        return bool(np.all(np.abs(stack - other) <= _TOLERANCE * scale))

    if np.all(scale <= zero):
        return "zero"
    if close(identity):
        return "identity"
    if close(stack[..., :1, :1] * identity):
        return "scalar"
    return "diagonal" if close(stack * identity) else "dense"


def _shifted(steps: Step, spread: float) -> bool:
    """Whether a mean moves by more than rounding, beside the deviation of what it is a mean of."""
    parts = [(steps.shift, spread)]
    for given in (steps.evidence, steps.observation):
        if given is not None:
            parts.append((given.shift, np.max(np.abs(given.noise))))
    return any(np.max(np.abs(part)) > _ROUNDING * np.sqrt(scale) for part, scale in parts)


def _kind(memory: Any, partition: Partition) -> tuple[Kind, str]:
    leaves = jax.tree.leaves(memory)
    size = partition.states.size
    matrix = leaves[0].shape if len(leaves) == 1 and leaves[0].ndim == 2 else None
    if matrix is None and len(leaves) == 1 and leaves[0].ndim == 1:
        matrix = (1, *leaves[0].shape)
    if partition.width == 1 and size > 1:
        if partition.blocks == 1:
            return "scalar", f"All {size} entries of the memory share one variance."
        if partition.rows == 1:
            return "diagonal", f"Each of the {size} entries has a variance of its own."
        return "diagonal", (
            f"The {size} entries are independent and have {partition.blocks} different variances, "
            f"each shared by {partition.rows} entries."
        )
    rows_are_rows = (
        matrix is not None
        and np.array_equal(
            partition.states.reshape(-1, partition.width), np.arange(size).reshape(matrix)
        )
        and partition.width == matrix[1]
    )
    if rows_are_rows and partition.blocks == 1:
        return "shared rows", (
            f"The {partition.rows} rows of the memory share one "
            f"{partition.width}×{partition.width} covariance."
        )
    if rows_are_rows and partition.rows == 1:
        return "separate rows", (
            f"The {partition.blocks} rows are independent, each with a "
            f"{partition.width}×{partition.width} covariance of its own."
        )
    if partition.width < size:
        return "blocks", (
            f"The memory falls into {partition.blocks * partition.rows} independent groups of "
            f"{partition.width} entries with {partition.blocks} different covariances."
        )
    return "dense", f"All {size} entries are tied together: one {size}×{size} covariance."
