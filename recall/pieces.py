"""The arrays of a run on disk in pieces: each process writes what its devices hold.

A piece is a tensor of a safetensors file, named by the array's place in the tree and the piece's
offsets, as "12@0,64". Together they hold every array once, whatever the devices were, and are read
back whole, so a run goes on with other devices.
"""

import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write_pieces(folder: Path, tree: Any) -> None:
    """Write this process's pieces of a tree's arrays, each array's copies once among all."""
    tensors = {}
    for place, leaf in enumerate(jax.tree.leaves(eqx.filter(tree, eqx.is_array))):
        for shard in jax.numpy.asarray(leaf).addressable_shards:
            if shard.replica_id == 0:
                offsets = ",".join(str(part.start or 0) for part in shard.index)
                tensors[f"{place}@{offsets}"] = np.asarray(shard.data, order="C")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"process-{jax.process_index()}.safetensors"
    save_file(tensors, file)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def read_pieces(folder: Path, like: Any) -> Any:
    """A tree with the arrays of a folder in place of its own, whole.

    Raises:
        ValueError: pieces are missing, or not of arrays like these.
    """
    arrays, rest = eqx.partition(like, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    whole = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
    missing = [leaf.size for leaf in leaves]
    try:
        for file in sorted(folder.glob("process-*.safetensors")):
            with safe_open(file, framework="numpy") as pieces:
                for name in pieces.keys():  # noqa: SIM118, it is no dictionary
                    place, offsets = _named(name)
                    piece = pieces.get_tensor(name)
                    _fill(whole[place], offsets, piece)
                    missing[place] -= piece.size
    except (SafetensorError, OSError, IndexError) as error:
        raise ValueError(str(error)) from error
    if any(missing):
        raise ValueError(f"{folder} lacks pieces of {sum(map(bool, missing))} arrays")
    return eqx.combine(jax.tree.unflatten(structure, map(jax.numpy.asarray, whole)), rest)


def _named(name: str) -> tuple[int, list[int]]:
    place, _, offsets = name.partition("@")
    return int(place), [int(offset) for offset in offsets.split(",") if offset]


def _fill(whole: np.ndarray, offsets: list[int], piece: np.ndarray) -> None:
    ends = [offset + size for offset, size in zip(offsets, piece.shape, strict=True)]
    inside = all(end <= size for end, size in zip(ends, whole.shape, strict=True))
    if piece.dtype != whole.dtype or not inside:
        given, wanted = f"{piece.dtype}{piece.shape}", f"{whole.dtype}{whole.shape}"
        raise ValueError(f"a piece of {given} does not fit an array of {wanted}")
    whole[tuple(map(slice, offsets, ends))] = piece
