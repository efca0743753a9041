"""Layers on 1, 2, 4, ... devices: whether they compute the same, how fast, and what they send.

    python -m benchmarks.devices --json results/devices_h100x4.json

On GPUs it needs one host with several. On CPUs devices are forced, times mean little, and numbers
are small:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.devices \
        --json results/devices_cpu.json

*Sequence*: one sequence of exact filters, its time split over all devices, beside one device, from
which errors are measured; strong scaling. *Data*: a Bayesian Layer's gradient for its parameters,
its batch split; the same rows on all devices together, and the same rows on each. *Model*: what
`layers.communication` and operations counted part by part say of the sequence's compiled program,
beside what the whole program holds; the same at up to 1,024 devices. It is counted on CPUs alone:
operations are the programs', not the devices'.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from layers import BayesianLayer, Stream, filter_scan, initial_belief, sharded_scan
from layers.communication import Traffic, counted, predicted
from layers.elements import Element, apply, combine
from layers.exchange import GATHERED
from layers.rules import Exact
from layers.sharded import DATA, HEADS, SEQUENCE, element_of, split_axis
from recall.records import keeper

from .kernels import Shape, relative, streams

FAR = (16, 64, 256, 1024)
"""Devices to which the model is carried on."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Args:
        time: tokens of the sequence that is split.
        heads: of that sequence.
        width: of keys and values.
        rows: of the batch that is split, and those of every device as it grows.
        row_time: tokens of each row.
        d_model: of the layer.
        calls: of each program, of which the median counts.
        model_time: tokens of the programs whose operations are counted.
        model_width: their keys and values.
    """

    time: int
    heads: int
    width: int
    rows: int
    row_time: int
    d_model: int
    calls: int
    model_time: int = 4096
    model_width: int = 64


SMALL = Config(2048, 2, 8, 8, 128, 16, 3)
LARGE = Config(262_144, 4, 64, 16, 4096, 512, 7)


def mesh_of(devices: int, axis: str) -> Mesh:
    """A mesh of the first devices along one axis; the others have one."""
    sizes = [devices if name == axis else 1 for name in (DATA, HEADS, SEQUENCE)]
    placed = np.asarray(jax.devices()[:devices]).reshape(sizes)
    return Mesh(placed, (DATA, HEADS, SEQUENCE), axis_types=(AxisType.Auto,) * 3)


def sequence(config: Config, devices: int, seed: int, expected: Any) -> tuple[dict[str, Any], Any]:
    """Filter one sequence over devices: times, memory, messages, errors; and what it gave."""
    shape = Shape(1, config.time, config.heads, config.width)
    stream = streams(shape, 1e-4, "float32", seed)
    mesh = mesh_of(devices, SEQUENCE)
    along = NamedSharding(mesh, PartitionSpec(None, SEQUENCE))
    stream = jax.tree.map(lambda leaf: jax.device_put(leaf, along), stream)

    def head(stream: Stream):
        scan = filter_scan if devices == 1 else partial(sharded_scan, mesh=mesh)
        return scan(stream)[1]

    def loss(stream: Stream) -> Array:
        reading = jax.vmap(head)(stream)
        squares = jnp.mean(reading.mean**2) + jnp.mean(reading.variance)
        return squares + jnp.mean(reading.log_evidence)

    found: dict[str, Any] = {"devices": devices}
    told = {}
    for name, function in (("forward", jax.vmap(head)), ("gradient", jax.grad(loss))):
        program = jax.jit(function).lower(stream).compile()
        told[name] = jax.tree.map(np.asarray, program(stream))
        found[name] = measured(lambda program=program: program(stream), config.calls)
        found[name] |= of_program(program, devices)
    errors = jax.tree.map(relative, told, told if expected is None else expected)
    found["errors"] = {
        "read-out": errors["forward"].mean,
        "variance": errors["forward"].variance,
        "gradient": max(jax.tree.leaves(errors["gradient"])),
    }
    return found, told if expected is None else expected


def data(config: Config, devices: int, rows: int, seed: int, expected: Any) -> tuple[dict, Any]:
    """A layer's gradient for its parameters, a batch split over devices."""
    heads = config.d_model // config.width
    layer = BayesianLayer(config.d_model, heads, rng=jax.random.key(seed))
    x = jax.random.normal(jax.random.key(seed + 1), (rows, config.row_time, config.d_model))
    mesh = mesh_of(devices, DATA)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(DATA)))
    arrays, rest = eqx.partition(layer, eqx.is_inexact_array)
    arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))

    def loss(arrays, x):
        layer = eqx.combine(arrays, rest)
        outputs = jax.vmap(lambda row: layer(row)[0], spmd_axis_name=split_axis(DATA))(x)
        return jnp.mean(outputs**2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(arrays, x).compile()
        told = jax.tree.map(np.asarray, program(arrays, x))
        found = measured(lambda: program(arrays, x), config.calls)
    found |= {"devices": devices, "rows": rows, **of_program(program, devices)}
    if expected is not None:
        found["error"] = max(jax.tree.leaves(jax.tree.map(relative, told, expected)))
    return found, told


def measured(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Median milliseconds of a call, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(times), "ms_lowest": 1e3 * min(times)}


def of_program(program: Any, devices: int) -> dict[str, Any]:
    """Temporary memory of each device, and bytes that it takes in, by kind of message."""
    messages = counted(program.as_text(), devices)
    return {
        "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
        "bytes_taken_in": {kind: total for kind, (_, total) in messages.items()},
    }


# -- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one head and one device: operations, and what it takes in."""

    devices: int
    operations: float
    of_filter: float
    of_element: float
    between: float
    messages: int
    bytes_taken_in: int


def operations(function: Callable[..., Any], *given: Any) -> float:
    """Counted by XLA in a compiled program that has no loops."""
    analysis = jax.jit(function).lower(*given).compile().cost_analysis()
    return float(analysis["flops"])


class Model:
    """What a head's forward pass costs, from its parts: w_f t + w_e t + what elements cost."""

    def __init__(self, width: int, length: int, seed: int) -> None:
        self.width, self.seed = width, seed
        self.filter_a_token = self._a_token(
            lambda stream: filter_scan(stream, algorithm="parallel")[1], length
        )
        prior = initial_belief(Exact(), width, width, 1.0)
        self.element_a_token = self._a_token(
            lambda stream: element_of(stream, prior, Exact(), "parallel"), length
        )
        square = jnp.eye(width)
        element = Element(square, square, square, square, square)
        self.combine = operations(combine, element, element)
        self.apply = operations(apply, element, square, square)

    def _a_token(self, function: Callable[..., Any], length: int) -> float:
        return operations(function, self.stream(length)) / length

    def stream(self, length: int) -> Stream:
        """One head's stream."""
        whole = streams(Shape(1, length, 1, self.width), 1e-4, "float32", self.seed)
        return jax.tree.map(lambda leaf: leaf[0], whole)

    def cost(self, time: int, devices: int) -> Cost:
        """Of a sequence of `time` tokens over so many devices."""
        traffic: Traffic = predicted(Exact(), devices, self.width, self.width)
        between = (devices - 1) * self.apply
        if devices > GATHERED:
            between = (traffic.rounds - 1) * self.combine + self.apply
        part = time / devices
        of_filter = self.filter_a_token * part
        of_element = self.element_a_token * part if devices > 1 else 0.0
        whole = of_filter + of_element + between
        sent = 4 * traffic.numbers
        return Cost(devices, whole, of_filter, of_element, between, traffic.rounds, sent)

    def of_program(self, time: int, devices: int) -> dict[str, Any]:
        """The same counted in the whole compiled program."""
        mesh = mesh_of(devices, SEQUENCE)

        def outputs(stream: Stream):
            if devices == 1:
                return filter_scan(stream, algorithm="parallel")[1]
            return sharded_scan(stream, mesh=mesh, algorithm="parallel", backend="xla")[1]

        program = jax.jit(outputs).lower(self.stream(time)).compile()
        messages = counted(program.as_text(), devices).values()
        return {
            "operations": float(program.cost_analysis()["flops"]),
            "bytes_taken_in": sum(total for _, total in messages),
        }


def run(config: Config, seed: int, progress: Callable[[dict[str, Any]], None]) -> None:
    """Everything on 1, 2, 4, ... devices; `progress` gets all that is known after every step."""
    counts = [count for count in (1, 2, 4, 8) if count <= len(jax.devices())]
    metrics: dict[str, Any] = {"sequence": [], "data": []}
    whole = gradients = None
    for devices in counts:
        found, whole = sequence(config, devices, seed, whole)
        metrics["sequence"].append(found)
        progress(metrics)
    for devices in counts:
        found, told = data(config, devices, config.rows, seed, gradients)
        gradients = told if gradients is None else gradients
        metrics["data"].append(found)
        if devices > 1:
            metrics["data"].append(data(config, devices, devices * config.rows, seed, None)[0])
        progress(metrics)
    if jax.default_backend() == "gpu":
        return
    model = Model(config.model_width, config.model_time // max(counts), seed)
    for devices in counts:
        said = asdict(model.cost(config.model_time, devices))
        said |= {"program": model.of_program(config.model_time, devices)}
        metrics.setdefault("model", []).append(said)
        progress(metrics)
    metrics["far"] = [asdict(model.cost(2**20, devices)) for devices in (1, *FAR)]
    progress(metrics)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = LARGE if jax.default_backend() == "gpu" else SMALL
    command = f"python -m benchmarks.devices --json {given.json.name}"

    write = keeper(given.json, asdict(config), command=command, seed=given.seed)

    def keep(metrics: dict[str, Any]) -> None:
        print(next(part[-1] for part in reversed(metrics.values()) if part), flush=True)
        write(metrics)

    run(config, given.seed, keep)


if __name__ == "__main__":
    main()
