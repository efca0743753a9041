"""The design model that `mbd new` writes: one to start from, which verifies as it stands."""

import shlex
from pathlib import Path

from design_models import ModelError

TEMPLATE = '''\
"""A memory of my own, stated as a design model.

Verify it:    mbd verify {file}:model
Train it:     mbd train mqar --layer {file}:model:wide --out runs/mine
Change it:    edit one assumption below, and verify again.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from design_models import DesignModel


def memory(value_width, key_width):
    """The design model, with values and keys of any widths."""

    def prior():
        """What the memory holds before anything is written."""
        mean = jnp.zeros((value_width, key_width))
        return numpyro.sample("memory", dist.Normal(mean, 1.0).to_event(2))

    def transition(memory, u):
        """What happens to the memory between two tokens: it fades, and it drifts."""
        fading = memory * u["decay"]
        return numpyro.sample("memory", dist.Normal(fading, jnp.sqrt(u["drift"])).to_event(2))

    def observe(memory, u):
        """How a token's value comes out of the memory: this is what a write assumes."""
        law = dist.Normal(memory @ u["key"], jnp.sqrt(u["noise"])).to_event(1)
        numpyro.sample("value", law, obs=u["value"])

    def readout(memory, u):
        """What the layer outputs: its mean is the output, its variance how far to trust it."""
        return memory @ u["query"]

    # `u` holds one token's inputs. key, query, value, decay, drift (a variance) and noise (a
    # variance) are drawn from defaults for verification; for other names pass
    # inputs=lambda rng, steps: {{"my_gate": jax.random.uniform(rng, (steps,)), ...}}.
    return DesignModel(prior, transition, observe, readout)


model = memory(3, 2)  # small widths verify fastest; what is proved does not depend on them
wide = memory(32, 32)  # what is trained, certified from `model`


def my_update(mean, covariance, u):
    """The same filter by hand; check it: mbd verify {file}:model --update {file}:my_update."""
    mean = mean * u["decay"]
    covariance = covariance * u["decay"] ** 2 + u["drift"] * jnp.eye(len(covariance))
    gain = covariance @ u["key"] / (u["key"] @ covariance @ u["key"] + u["noise"])
    mean = mean + jnp.outer(u["value"] - mean @ u["key"], gain)
    covariance = covariance - jnp.outer(gain, u["key"] @ covariance)
    return mean, covariance
'''


def write_new_model(path: Path) -> None:
    """Write the template to `path`.

    Raises:
        ModelError: the name does not end in .py, its folder is missing, or the file is there.
    """
    if path.suffix != ".py":
        raise ModelError(f"{path} does not end in .py; name a Python file, such as my_memory.py.")
    if path.exists():
        raise ModelError(f"{path} is there already; choose another name, nothing was changed.")
    if not path.parent.is_dir():
        raise ModelError(f"there is no folder {path.parent}; make it first.")
    try:
        path.write_text(TEMPLATE.format(file=shlex.quote(path.name)), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}; choose another.") from error
