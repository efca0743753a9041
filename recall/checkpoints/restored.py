"""What a checkpoint with Bayesian Layers holds beside the format: two files of our own."""

import json
from dataclasses import asdict
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from design_models import ModelError
from layers import LanguageModel

from . import names
from .surgery import Restoration, dials, restoration_of, restored_mixer, with_dials

LAYERS, NUMBERS = "restoration.json", "restoration.safetensors"


def write_restoration(folder: Path, model: LanguageModel) -> None:
    """Write which layers are restored, how, and their own numbers; nothing where none is.

    Raises:
        OSError: the folder cannot be written.
    """
    found, numbers = {}, {}
    for layer, block in enumerate(model.blocks):
        how = restoration_of(block.mixer)
        if how is not None:
            found[str(layer)] = asdict(how)
            for name, array in dials(block.mixer).items():
                numbers[names.block_prefix(layer) + name] = np.asarray(array, np.float32)
    if found:
        (folder / LAYERS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        save_file(numbers, folder / NUMBERS)


def read_restoration(folder: Path, model: LanguageModel) -> LanguageModel:
    """The model with the layers restored that the folder says; as it is where it says none.

    Raises:
        ModelError: the files do not fit each other or the model.
    """
    if not (folder / LAYERS).is_file():
        return model
    try:
        said = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
        held = load_file(folder / NUMBERS)
        for number, settings in said.items():
            layer = int(number)
            how = Restoration(**settings | {"heads": tuple(settings["heads"])})
            mixer = restored_mixer(model.blocks[layer].mixer, how)
            own = dials(mixer)
            given = {name: held.pop(names.block_prefix(layer) + name) for name in own}
            for name, array in own.items():
                if given[name].shape != array.shape:
                    raise ValueError(f"{name} of layer {layer} is {given[name].shape}")
            arrays = {name: jnp.asarray(array, jnp.float32) for name, array in given.items()}
            mixer = with_dials(mixer, arrays)
            model = eqx.tree_at(lambda model, at=layer: model.blocks[at].mixer, model, mixer)
        if held:
            raise ValueError(f"{sorted(held)[0]} belongs to no restored layer")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"{folder / LAYERS} and {NUMBERS} do not fit this model ({error}); write both again, "
            "or remove both to read the delta rules alone."
        ) from error
    return model
