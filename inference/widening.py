"""The partition of a wide memory, from that of a narrow instance of the same model."""

import jax
import numpy as np

from design_models import ModelError

from .partition import Index, Partition
from .proof import Proof, ProvedSite


def widen_partition(narrow: Partition, narrow_proof: Proof, wide_proof: Proof) -> Partition:
    """Carry the blocks and rows of a (value, key) memory over to another width.

    Raises:
        ModelError: the memory is not one (value, key) array, or its blocks are neither its rows,
            its columns nor its entries.
    """
    small, large = (_matrix_shape(proof) for proof in (narrow_proof, wide_proof))
    view = _view(narrow, small)

    def sites(before: tuple[ProvedSite, ...], after: tuple[ProvedSite, ...], found: Index | None):
        if found is None:
            return None
        shapes = [site.shape for site in before], [site.shape for site in after]
        if view.by_entry:
            return _by_entry(view, shapes[1], large)
        return _by_row(view, found, *shapes, small[0], large[0])

    return Partition(
        view.arrange(np.arange(large[0] * large[1]).reshape(large)),
        sites(narrow_proof.transition.observed, wide_proof.transition.observed, narrow.evidence),
        sites(narrow_proof.observe.observed, wide_proof.observe.observed, narrow.observed),
    )


class _View:
    """How a (value, key) array of positions is cut into (block, row, width)."""

    def __init__(self, by_entry: bool, arrange) -> None:
        self.by_entry = by_entry
        self.arrange = arrange


_VIEWS = (
    _View(False, lambda grid: grid[None]),  # rows share one covariance
    _View(False, lambda grid: grid[:, None]),  # each row has its own
    _View(True, lambda grid: grid.reshape(1, -1, 1)),  # entries share one variance
    _View(True, lambda grid: grid.T[..., None]),  # a variance per column
    _View(True, lambda grid: grid[..., None]),  # a variance per row
    _View(True, lambda grid: grid.reshape(-1, 1, 1)),  # a variance per entry
)


def _view(partition: Partition, shape: tuple[int, int]) -> _View:
    grid = np.arange(shape[0] * shape[1]).reshape(shape)
    for view in _VIEWS:
        if np.array_equal(view.arrange(grid), partition.states):
            return view
    raise ModelError(
        "the memory's blocks are neither its rows, columns nor entries, so its structure does not "
        "carry over to another width; derive the model at the width it is used at."
    )


def _matrix_shape(proof: Proof) -> tuple[int, int]:
    leaves = jax.tree.leaves(proof.memory)
    if len(leaves) != 1 or leaves[0].ndim != 2:
        shapes = [leaf.shape for leaf in leaves]
        raise ModelError(f"the memory has shapes {shapes}; only one (value, key) array is widened.")
    return leaves[0].shape


def _offsets(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Positions of every site's entries in the flattened observations."""
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    return [
        np.arange(start, start + int(np.prod(shape))).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


def _by_entry(view: _View, shapes: list[tuple[int, ...]], memory: tuple[int, int]) -> Index:
    for shape in shapes:
        if shape != memory:
            raise ModelError(
                f"a site of shape {shape} does not observe a {memory} memory by entry."
            )
    return np.concatenate([view.arrange(places) for places in _offsets(shapes)], axis=-1)


def _by_row(
    view: _View,
    found: Index,
    before: list[tuple[int, ...]],
    after: list[tuple[int, ...]],
    rows_before: int,
    rows_after: int,
) -> Index:
    """Find each site's axis that runs over rows at the narrow width; use it at the wide one."""
    parts = []
    for small, large in zip(_offsets(before), _offsets(after), strict=True):
        axes = [axis for axis in range(small.ndim) if small.shape[axis] == rows_before]
        for axis in axes:
            rows = np.sort(np.moveaxis(small, axis, 0).reshape(rows_before, -1), axis=1)
            inside = np.isin(found, small).any(axis=-1).all() and all(
                np.isin(row, found.reshape(rows_before, -1)[i]).all() for i, row in enumerate(rows)
            )
            if inside:
                moved = np.moveaxis(large, axis, 0).reshape(rows_after, -1)
                parts.append(np.sort(moved, axis=1))
                break
        else:
            raise ModelError(f"no axis of a site of shape {small.shape} runs over the rows.")
    places = np.sort(np.concatenate(parts, axis=1), axis=1)
    return places[None] if found.shape[0] == 1 else places[:, None]
