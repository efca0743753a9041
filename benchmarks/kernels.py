"""Speed, memory and accuracy of the kernels beside their peers, in one process on one GPU.

    python -m benchmarks.kernels --json results/kernels_h200.json

Inputs are bfloat16. Times are medians over batches of calls, of which each waits for the last
alone, so that launches are not counted. Errors are of two heads, relative by the norm of each
array, to the filter token by token in float64 of the same rounded inputs. Peers are timed where
installed: `jax-linear-attention`, and flash-linear-attention (`fla-core`) by `torch_peers`.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from layers import Restored, Stream, filter_scan
from layers.rules import Exact
from recall.records import keeper

OURS, XLA = "exact filter, kernels", "exact filter, XLA"
RESTORED, PER_KEY = "restored filter, kernels", "exact filter, rates per key, kernels"
PEERS = {"gated delta rule": "gated_deltanet", "KDA": "kda", "GLA": "gla", "SSD": "simple_gla"}


@dataclass(frozen=True)
class Shape:
    """Batch, time, heads, and the width of keys and values."""

    batch: int
    time: int
    heads: int
    width: int = 64


@dataclass(frozen=True)
class Config:
    """What is timed, and how often."""

    shapes: tuple[Shape, ...] = (Shape(8, 4096, 16), Shape(1, 32768, 16), Shape(8, 2048, 8, 128))
    xla: tuple[Shape, ...] = (Shape(8, 4096, 16), Shape(8, 2048, 8, 128))
    drift: float = 1e-4
    batches: int = 5
    calls: int = 10


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, and temporary memory of the gradient in MB."""

    shape: Shape
    contender: str
    forward_ms: float
    gradient_ms: float
    memory_mb: float


@dataclass(frozen=True)
class Accuracy:
    """Relative errors of the read-out, its variance, and every gradient."""

    shape: Shape
    contender: str
    dtype: str
    errors: dict[str, float]


def streams(shape: Shape, drift: float, dtype: str, seed: int, rows: int | None = None) -> Stream:
    """One stream a head: unit keys and queries, decays within 2 % of 1, noise from 0.05 to 0.55."""
    rngs = jax.random.split(jax.random.key(seed), 5)
    numbers = (rows or shape.batch * shape.heads, shape.time)
    key, query, value = (jax.random.normal(rng, (*numbers, shape.width)) for rng in rngs[:3])
    key, query = (part / jnp.linalg.norm(part, axis=-1, keepdims=True) for part in (key, query))
    return Stream(
        key.astype(dtype),
        value.astype(dtype),
        query.astype(dtype),
        0.05 + 0.5 * jax.random.uniform(rngs[3], numbers),
        -0.02 * jax.random.uniform(rngs[4], numbers),
        jnp.full(numbers, drift),
    )


def exact(contender: str, **how: Any) -> Callable[[Stream], tuple[Array, Array]]:
    """Read-outs and variances of every head.

    A restoration is 1/(1 + r) a token, so that its derivative is asked for; rates per key are 0.5
    to 1.5 times the stream's.
    """

    def head(stream: Stream) -> tuple[Array, Array]:
        rule = Restored(1 / (1 + stream.noise)) if contender == RESTORED else Exact()
        if contender == PER_KEY:
            assert stream.log_decay is not None
            assert stream.drift is not None
            spread = jnp.linspace(0.5, 1.5, stream.key.shape[-1])
            rates = (rate[:, None] * spread for rate in (stream.log_decay, stream.drift))
            stream = replace(stream, **dict(zip(("log_decay", "drift"), rates, strict=True)))
        _, reading = filter_scan(stream, 1.0, rule, **how)
        return reading.mean, reading.variance

    return jax.vmap(head)


def peer(kind: str, shape: Shape) -> Callable[[Stream], tuple[Array]]:
    """An operation of `jax-linear-attention` on the same arrays."""
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    def by_head(array: Array) -> Array:
        return jnp.swapaxes(array.reshape(shape.batch, shape.heads, *array.shape[1:]), 1, 2)

    def run(stream: Stream) -> tuple[Array]:
        assert stream.log_decay is not None
        key, value, query = map(by_head, (stream.key, stream.value, stream.query))
        gates = {"g": by_head(stream.log_decay)}
        if kind in ("kda", "gla"):
            gates["g"] = jnp.broadcast_to(gates["g"][..., None], key.shape)
        if kind in ("kda", "gated_deltanet"):
            gates["beta"] = by_head(1 / (1 + stream.noise))
        tokens = (query, key, value)
        return (linear_attention(kind, *tokens, impl="auto", scale=1.0, **gates)[0],)

    return run


def contenders(shape: Shape, config: Config) -> dict[str, Callable[[Stream], tuple[Array, ...]]]:
    """What is timed on a shape."""
    labels = (OURS, RESTORED, PER_KEY)[: 3 if shape.width == 64 else 2]
    out: dict[str, Callable[[Stream], tuple[Array, ...]]] = {
        label: exact(label, backend="mosaic") for label in labels
    }
    if importlib.util.find_spec("jla") is not None:
        peers = PEERS.items() if shape.width == 64 else list(PEERS.items())[:1]
        out |= {f"{label}, jax-linear-attention": peer(kind, shape) for label, kind in peers}
    if shape in config.xla:
        out[XLA] = exact(OURS, backend="xla")
    return out


def differentiated(function: Callable[[Stream], tuple[Array, ...]]) -> Callable[[Stream], Stream]:
    """The gradient, for every input, of the sum of squared read-outs."""

    def loss(stream: Stream) -> Array:
        return jnp.sum(jnp.square(function(stream)[0].astype(jnp.float32)))

    return jax.grad(loss)


def timed(shape: Shape, label: str, function, stream: Stream, config: Config) -> Timing:
    """Time one contender."""
    forward = jax.jit(function).lower(stream).compile()
    gradient = jax.jit(differentiated(function)).lower(stream).compile()
    memory = gradient.memory_analysis()
    return Timing(
        shape,
        label,
        milliseconds(forward, stream, config),
        milliseconds(gradient, stream, config),
        0.0 if memory is None else memory.temp_size_in_bytes / 1e6,
    )


def milliseconds(function: Callable[[Stream], Any], stream: Stream, config: Config) -> float:
    jax.block_until_ready(function(stream))
    times = []
    for _ in range(config.batches):
        start = time.perf_counter()
        jax.block_until_ready([function(stream) for _ in range(config.calls)][-1])
        times.append((time.perf_counter() - start) / config.calls)
    return 1e3 * statistics.median(times)


def accuracy(shape: Shape, label: str, dtype: str, config: Config, seed: int) -> Accuracy:
    """Errors of two heads, whole sequences."""
    few = streams(shape, config.drift, dtype, seed, rows=2)

    def both(stream: Stream, function):
        return *function(stream), *jax.tree.leaves(differentiated(function)(stream))

    found = jax.jit(lambda stream: both(stream, exact(label, backend="mosaic")))(few)
    with jax.enable_x64(True):
        whole = jax.tree.map(lambda part: part.astype("float64"), few)
        expected = jax.jit(lambda stream: both(stream, exact(label, algorithm="token")))(whole)
        names = ("read-out", "variance", "key", "value", "query", "noise", "log_decay", "drift")
        return Accuracy(
            shape, label, dtype, dict(zip(names, map(relative, found, expected), strict=True))
        )


def torch_peers(shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """Timings by `benchmarks.torch_peers`, in a process of its own on the same GPU, as they come.

    Triton tries every configuration of every peer first, which takes minutes.
    """
    words = (",".join(map(str, asdict(shape).values())) for shape in shapes)
    command = [sys.executable, "-m", "benchmarks.torch_peers", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    found, expected = (np.asarray(part).astype(np.float64) for part in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run(config: Config, seed: int, progress: Callable[[dict[str, Any]], None]) -> None:
    """Check and time everything; `progress` gets all that is known so far, after every step."""
    errors: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    for shape in config.shapes:
        stream = streams(shape, config.drift, "bfloat16", seed)
        for label, function in contenders(shape, config).items():
            timings.append(asdict(timed(shape, label, function, stream, config)))
            progress({"timings": timings, "errors": errors})
    first, second, wide = config.shapes
    cases = (
        (first, OURS, "bfloat16"),
        (first, OURS, "float32"),
        (first, RESTORED, "bfloat16"),
        (first, PER_KEY, "bfloat16"),
        (second, OURS, "bfloat16"),
        (wide, OURS, "bfloat16"),
        (wide, RESTORED, "bfloat16"),
    )
    for case in cases:
        errors.append(asdict(accuracy(*case, config, seed)))
        progress({"timings": timings, "errors": errors})
    if importlib.util.find_spec("fla") is not None:
        for timing in torch_peers(config.shapes):
            timings.append(timing)
            progress({"errors": errors, "timings": timings})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = Config()
    command = f"python -m benchmarks.kernels --json {given.json.name} --seed {given.seed}"

    write = keeper(given.json, asdict(config), command=command, seed=given.seed)

    def keep(metrics: dict[str, Any]) -> None:
        print(next(part[-1] for part in reversed(metrics.values()) if part), flush=True)
        write(metrics)

    run(config, given.seed, keep)


if __name__ == "__main__":
    main()
