"""A checkpoint as a folder: config.json, safetensors in one file or in shards, a tokenizer.

Pickled weights are never opened: to load one is to run the program that it holds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from design_models import ModelError
from layers import LanguageModel

from . import names
from .configuration import Configuration, read_configuration
from .model import model_of, tensors_of
from .restored import read_restoration, write_restoration

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BESIDE = (
    "config.json",
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that are kept as they are."""

_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: what it is called, says of itself, and holds.

    Args:
        name: of the file.
        metadata: of its header.
        dtypes: of every weight in it, by the weight's name.
    """

    name: str
    metadata: Mapping[str, str] | None
    dtypes: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A model, and all that it takes to write its folder again.

    Args:
        configuration: of the model.
        model: in float32.
        files: in which the weights lay.
        beside: other files, byte for byte.
    """

    configuration: Configuration
    model: LanguageModel
    files: tuple[WeightFile, ...]
    beside: Mapping[str, bytes]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder, restored layers included; nothing in it is run.

    Raises:
        ModelError: it holds no such checkpoint, or keys or shapes other than its config.json asks.
    """
    if not folder.is_dir():
        raise ModelError(f"`FOLDER` is {folder}; name a folder with config.json and safetensors.")
    configuration = read_configuration(folder / "config.json")
    paths, listed = _weight_files(folder)
    needed = names.shapes(configuration)
    tensors: dict[str, np.ndarray] = {}
    files = []
    for path in paths:
        file, found = _read(path, needed, configuration.tied)
        if twice := sorted(set(found) & set(tensors)):
            raise ModelError(f"{path} holds {_some(twice)} once more; keep one of each.")
        tensors |= found
        files.append(file)
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise ModelError(f"{folder} lacks {_some(missing)}, which its config.json asks for.")
    if listed is not None:
        lying = {name: file.name for file in files for name in file.dtypes}
        wrong = sorted(name for name in lying | listed if lying.get(name) != listed.get(name))
        if wrong:
            raise ModelError(f"{folder / INDEX} is wrong about {_some(wrong)}; mend `weight_map`.")
    if names.HEAD in tensors and names.HEAD not in needed:
        head, embedding = tensors[names.HEAD], tensors[names.EMBEDDING]
        if head.shape != embedding.shape or head.tobytes() != embedding.tobytes():
            raise ModelError(
                f"`tie_word_embeddings` is true, but {names.HEAD} is not {names.EMBEDDING}; set it "
                "to false."
            )
    beside = {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).is_file()}
    model = read_restoration(folder, model_of(configuration, tensors))
    return Checkpoint(configuration, model, tuple(files), beside)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder of the same format: the same names, dtypes, shards and other files.

    Weights that have not changed come out bit for bit as they were read. Restored layers are told
    in two more files, which `read_checkpoint` reads again; without them the folder is a checkpoint
    of delta rules.

    Raises:
        ModelError: the folder holds something or cannot be written.
    """
    tensors = tensors_of(checkpoint.model, checkpoint.configuration)
    if names.HEAD not in tensors:
        tensors[names.HEAD] = tensors[names.EMBEDDING]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ModelError(f"`--out` is {folder}, which is not empty; name another folder.")
        for name, text in checkpoint.beside.items():
            (folder / name).write_bytes(text)
        for file in checkpoint.files:
            held = {name: tensors[name].astype(dtype) for name, dtype in file.dtypes.items()}
            metadata = None if file.metadata is None else dict(file.metadata)
            save_file(held, folder / file.name, metadata=metadata)
        write_restoration(folder, checkpoint.model)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ModelError(f"`--out` is {folder}: {said}; name another folder.") from error


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and what the index says of each weight where there is one.

    A file of all weights is preferred to shards, as it is upstream.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], None
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                f"{folder} holds {pickles[0]}, a pickle, which could run any program; save the "
                "weights as safetensors."
            )
        raise ModelError(f"{folder} holds no {WEIGHTS} and no {INDEX}.")
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} holds no `weight_map` of names to files.") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{folder / INDEX} names {shard!r}, which is no file beside it.")
        if not shard.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX} names {shard}; only safetensors are read.")
        if not (folder / shard).is_file():
            raise ModelError(f"{folder} lacks {shard}, which {INDEX} names.")
    if not shards:
        raise ModelError(f"{folder / INDEX} names no file.")
    return [folder / shard for shard in shards], listed


def _read(
    path: Path, needed: Mapping[str, tuple[int, ...]], tied: bool
) -> tuple[WeightFile, dict[str, np.ndarray]]:
    """One file's weights; names, dtypes and shapes are checked before any is read."""
    shapes = dict(needed)
    if tied:
        shapes[names.HEAD] = shapes[names.EMBEDDING]
    dtypes: dict[str, Any] = {}
    try:
        with safe_open(path, "np") as file:
            held = list(file.keys())
            unknown = sorted(set(held) - set(shapes))
            if unknown:
                raise ModelError(f"{path} holds {_some(unknown)}, which its config.json has not.")
            for name in held:
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if shape != shapes[name]:
                    raise ModelError(
                        f"{path}: {name} is {shape}; its config.json asks for {shapes[name]}."
                    )
                if dtype not in _DTYPES:
                    raise ModelError(
                        f"{path}: {name} is {dtype}; weights must be {', '.join(_DTYPES)}."
                    )
                dtypes[name] = _DTYPES[dtype]
            return WeightFile(path.name, file.metadata(), dtypes), {
                name: file.get_tensor(name) for name in held
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no safetensors file that can be read: {error}.") from error


def _some(found: list[str]) -> str:
    """The first few of many names."""
    more = len(found) - 3
    return ", ".join(found[:3]) + (f" and {more} more" if more > 0 else "")
