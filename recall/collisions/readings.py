"""What layers of the catalogue read after scripted writes, without learning.

A layer is run as its own memory (`layers.published_mixer(...).memory`) with keys, values, queries,
noise, decay and drift given to it, in float64. The i-th value written is the i-th unit vector, so
a read-out holds the weight of every write: read-outs are linear in the values, and rows of values
share their gates, so these weights are what the layer does with any values.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from design_models.catalogue import RETENTION
from layers import published_mixer
from layers.memory import Memory


class Script(NamedTuple):
    """Cases to run: each writes some of its positions, in their order, and is then read.

    Args:
        key: unit keys.
        noise: noise variance that the layer takes each write to have.
        written: False where nothing happens; no time passes there.
        query: what is read after the last write.
    """

    key: Float[np.ndarray, "case write key"]
    noise: Float[np.ndarray, "case write"]
    written: Bool[np.ndarray, "case write"]
    query: Float[np.ndarray, "case key"]


class Read(NamedTuple):
    """What was read.

    Args:
        weights: of every write in the read-out; 0 where nothing was written.
        variance: how unsure the layer says an entry of the read-out is.
    """

    weights: Float[np.ndarray, "case write"]
    variance: Float[np.ndarray, " case"]


@dataclass(frozen=True)
class Forgetting:
    """Decay a and drift q at every write, for layers that take them; RetNet has its own decay.

    MesaNet has neither and is given a as its forget rate.
    """

    decay: float = 1.0
    drift: float = 0.0


def read(layer: str, script: Script, forgetting: Forgetting | None = None) -> Read:
    """Run a layer of the catalogue on every case of a script.

    Args:
        layer: its name.
        script: what is written and read.
        forgetting: none where left out.
    """
    forgetting = Forgetting() if forgetting is None else forgetting
    writes, width = script.key.shape[1:]
    memory = _memory(layer, writes, width)
    with jax.enable_x64(True):
        weights, variance = _read_cases(
            memory,
            (layer == "retnet", forgetting),
            *(jnp.asarray(part) for part in script),
        )
    return Read(np.asarray(weights), np.asarray(variance))


def gates(layer: str) -> frozenset[str]:
    """What a layer can be given beside keys, values and queries: noise, log_decay, drift, rate."""
    return frozenset(_memory(layer, 1, 1).inputs) - {"key", "value", "query"}


@cache
def _memory(layer: str, value_width: int, key_width: int) -> Memory:
    rng = jax.random.key(0)  # of parameters of the mixer around it, which are not used
    return published_mixer(
        layer, 1, 1, key_width=key_width, value_width=value_width, rng=rng
    ).memory


@eqx.filter_jit
def _read_cases(
    memory: Memory, gates: tuple[bool, Forgetting], key, noise, written, query
) -> tuple[Array, Array]:
    def case(given):
        key, noise, written, query = given
        inputs = {
            name: _input(name, shape, gates, key, noise, query)
            for name, shape in memory.inputs.items()
        }
        prediction, _ = memory(inputs, memory.init_state(), mask=written)
        last = jnp.max(jnp.where(written, jnp.arange(len(written)), 0))
        return prediction.mean[last], jnp.mean(prediction.variance[last])

    return jax.lax.map(case, (key, noise, written, query))


def _input(name, shape, gates: tuple[bool, Forgetting], key, noise, query) -> Array:
    """An input of a memory at every write; of two writes a token the first is empty."""
    retention, forgetting = gates
    time = len(key)
    match name:
        case "key" | "value":
            array = key if name == "key" else jnp.eye(time)
            if len(shape) == 2:
                array = jnp.stack([jnp.zeros_like(array), array], axis=1)
        case "query":
            array = jnp.broadcast_to(query, (time, *shape))
        case "noise":
            array = jnp.broadcast_to(noise.reshape(-1, *[1] * len(shape)), (time, *shape))
        case "log_decay":
            decay = RETENTION if retention else forgetting.decay
            array = jnp.full((time, *shape), jnp.log(decay))
        case "drift":
            array = jnp.full((time, *shape), forgetting.drift)
        case "rate":
            array = jnp.full((time, *shape), forgetting.decay)
        case "step":
            array = jnp.ones((time, *shape))
        case _:
            raise NotImplementedError(f"a script does not say what input {name!r} is")
    return array
