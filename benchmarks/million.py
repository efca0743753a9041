"""1,048,576 tokens through a Bayesian Layer: time, memory, errors, definiteness, calibration.

    python -m benchmarks.million --json results/million_h200.json

On several devices (forced ones too) the sequence is also split over all of them, and compared in
float64 with one:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.million \
        --width 8 --heads 1 --json results/million_cpu.json

Values are drawn from the filter's own model: a memory that fades and drifts, seen through noise.
So each value's squared innovation over its stated variance has mean 1, and its 90 % interval holds
it in 90 % of cases, at the end as at the beginning. Along the way, at the end of each sixteenth,
the belief in float32 is compared with that of the filter token by token in float64.
"""

import argparse
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
from jax.sharding import AxisType, Mesh
from jaxtyping import Array
from scipy import stats

from layers import BayesianLayer, Belief, Stream, filter_scan, sharded_scan
from layers.sharded import DATA, HEADS, SEQUENCE
from recall.records import keeper

from .kernels import relative

TIME, STRETCHES = 2**20, 16


@dataclass(frozen=True)
class Config:
    """What is run.

    Args:
        time: tokens.
        width: of keys and values.
        heads: side by side.
        decay: of a memory's standard deviation, a token.
        noise: variance of a value's entries.
        stretches: at whose ends beliefs are compared.
    """

    time: int
    width: int
    heads: int
    decay: float = 0.9999
    noise: float = 0.01
    stretches: int = STRETCHES

    @property
    def drift(self) -> float:
        """What keeps the prior variance at 1."""
        return 1 - self.decay**2


def draw(config: Config, rng: Array) -> Stream:
    """A stream of one head from its own model: S ← a S + w, v = S k + e, k a unit vector."""
    rng_start, rng_key, rng_query, rng_steps = jax.random.split(rng, 4)
    shape, width = (config.time, config.width), config.width
    key, query = (jax.random.normal(one, shape) for one in (rng_key, rng_query))
    key, query = (part / jnp.linalg.norm(part, axis=-1, keepdims=True) for part in (key, query))

    def step(memory, moment):
        place, key = moment
        rng_drift, rng_noise = jax.random.split(jax.random.fold_in(rng_steps, place))
        drift = jax.random.normal(rng_drift, (width, width))
        memory = config.decay * memory + config.drift**0.5 * drift
        noise = config.noise**0.5 * jax.random.normal(rng_noise, (width,))
        return memory, memory @ key + noise

    memory = jax.random.normal(rng_start, (width, width))
    _, value = jax.lax.scan(step, memory, (jnp.arange(config.time), key))
    each = jnp.ones(config.time)
    return Stream(
        key,
        value,
        query,
        config.noise * each,
        jnp.log(config.decay) * each,
        config.drift * each,
    )


def stretch(stream: Stream, config: Config, place: int) -> Stream:
    """One of the equal stretches, of every head."""
    length = config.time // config.stretches
    return jax.tree.map(lambda leaf: leaf[:, place * length : (place + 1) * length], stream)


def along_the_way(stream: Stream, config: Config, algorithm: str, dtype: str) -> list[Any]:
    """Beliefs at the stretches' ends, and the readings of the last 64 tokens before each."""
    with jax.enable_x64(dtype == "float64"):

        def piece(belief, stream):
            stream = jax.tree.map(lambda leaf: leaf.astype(dtype), stream)
            scan = partial(filter_scan, algorithm=algorithm)
            last, reading = jax.vmap(lambda one, before: scan(one, initial=before))(stream, belief)
            return last, jax.tree.map(lambda leaf: leaf[:, -64:], reading)

        identity = jnp.eye(config.width, dtype=dtype)
        square = jnp.broadcast_to(identity, (config.heads, *identity.shape))
        belief, found = Belief(jnp.zeros_like(square), square), []
        run = jax.jit(piece)
        for place in range(config.stretches):
            belief, reading = run(belief, stretch(stream, config, place))
            found.append(jax.tree.map(np.asarray, (belief, reading)))
    return found


def errors(found: list[Any], expected: list[Any]) -> list[dict[str, float]]:
    """Relative errors at each stretch's end, and the smallest eigenvalue of a covariance."""
    lines = []
    for (belief, reading), (exact, read) in zip(found, expected, strict=True):
        eigenvalues = np.linalg.eigvalsh(belief.covariance.astype(np.float64))
        lines.append(
            {
                "mean": relative(belief.mean, exact.mean),
                "covariance": relative(belief.covariance, exact.covariance),
                "read-out": relative(reading.mean, read.mean),
                "variance": relative(reading.variance, read.variance),
                "smallest_eigenvalue": float(eigenvalues.min()),
                "smallest_eigenvalue_float64": float(np.linalg.eigvalsh(exact.covariance).min()),
            }
        )
    return lines


def calibration(stream: Stream, config: Config) -> list[dict[str, float]]:
    """Of one pass over everything in float32: how innovations compare with what was stated.

    Each token is read at its own key after its write, where a variance p has become p r/(p + r) and
    the innovation e has shrunk to e r/(p + r); both are undone.
    """

    def head(stream: Stream):
        _, reading = filter_scan(eqx.tree_at(lambda one: one.query, stream, stream.key))
        spread = stream.noise**2 / (stream.noise - reading.variance)  # p + r
        innovation = (stream.value - reading.mean) * (spread / stream.noise)[:, None]
        return innovation**2 / spread[:, None]

    squares = np.asarray(jax.jit(jax.vmap(head))(stream), np.float64)
    inside = squares < stats.norm.ppf(0.95) ** 2
    parts = (np.split(part, config.stretches, axis=1) for part in (squares, inside))
    return [
        {"mean_square": float(one.mean()), "coverage_90": float(two.mean())}
        for one, two in zip(*parts, strict=True)
    ]


def outputs(scan: Callable[..., Any], stream: Stream) -> tuple[Array, Array]:
    """Read-outs and variances of every head."""
    _, reading = jax.vmap(scan)(stream)
    return reading.mean, reading.variance


def squared(scan: Callable[..., Any], stream: Stream) -> Array:
    """A loss whose gradient needs every read-out and variance."""
    mean, variance = outputs(scan, stream)
    return jnp.mean(mean**2) + jnp.mean(variance)


def timed(function: Callable[..., Any], *given: Any) -> dict[str, float]:
    """Milliseconds of a second call, and what the program takes beside its inputs."""
    program = jax.jit(function).lower(*given).compile()
    jax.block_until_ready(program(*given))
    start = time.perf_counter()
    jax.block_until_ready(program(*given))
    milliseconds, memory = 1e3 * (time.perf_counter() - start), program.memory_analysis()
    return {
        "ms": milliseconds,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "outputs_mb": memory.output_size_in_bytes / 1e6,
        "inputs_mb": memory.argument_size_in_bytes / 1e6,
    }


def layer_times(config: Config, rng: Array) -> dict[str, Any]:
    """A whole layer, projections and norms included, over the sequence: forward, and gradient."""
    d_model = config.heads * config.width
    layer = BayesianLayer(d_model, config.heads, rng=rng)
    x = jax.random.normal(rng, (config.time, d_model))
    arrays, rest = eqx.partition(layer, eqx.is_inexact_array)

    def loss(arrays, x):
        return jnp.mean(eqx.combine(arrays, rest)(x)[0] ** 2)

    return {
        "forward": timed(lambda arrays, x: eqx.combine(arrays, rest)(x)[0], arrays, x),
        "gradient": timed(jax.grad(loss), arrays, x),
    }


def over_devices(stream: Stream) -> dict[str, Any]:
    """The same split over all devices, in float64 and float32, beside one device in float64."""
    devices = jax.devices()
    placed = np.asarray(devices).reshape(1, 1, -1)
    mesh = Mesh(placed, (DATA, HEADS, SEQUENCE), axis_types=(AxisType.Auto,) * 3)
    split, found = partial(sharded_scan, mesh=mesh), {"devices": len(devices)}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype("float64"), stream)
        exact = jax.jit(partial(outputs, filter_scan))(wide)
        for dtype, given in (("float64", wide), ("float32", stream)):
            told = jax.jit(partial(outputs, split))(given)
            found[dtype] = {
                "read-out": relative(told[0], exact[0]),
                "variance": relative(told[1], exact[1]),
                "worst_variance": float(np.max(np.abs(np.asarray(told[1]) / exact[1] - 1))),
            }
    found["forward"] = timed(partial(outputs, split), stream)
    return found


def run(config: Config, seed: int, progress: Callable[[dict[str, Any]], None]) -> None:
    """Everything; `progress` gets all that is known after every step."""
    metrics: dict[str, Any] = {}

    def keep(name: str, found: Any) -> None:
        metrics[name] = found
        progress(metrics)

    rngs = jax.random.split(jax.random.key(seed), config.heads)
    stream = jax.jit(jax.vmap(partial(draw, config)))(rngs)
    keep("calibration", calibration(stream, config))
    expected = along_the_way(stream, config, "token", "float64")
    found = along_the_way(stream, config, "chunked", "float32")
    keep("along_the_way", errors(found, expected))
    if len(jax.devices()) > 1:
        keep("over_devices", over_devices(stream))
    keep("forward", timed(partial(outputs, filter_scan), stream))
    if jax.default_backend() == "gpu":
        keep("gradient", timed(jax.grad(partial(squared, filter_scan)), stream))
        keep("layer", layer_times(config, rngs[0]))
        memory = jax.devices()[0].memory_stats() or {}
        keep("peak_mb", memory.get("peak_bytes_in_use", 0) / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    parser.add_argument("--width", type=int, default=64, help="of keys and values (default 64)")
    parser.add_argument("--heads", type=int, default=4, help="side by side (default 4)")
    parser.add_argument("--time", type=int, default=TIME, help=f"tokens (default {TIME})")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = Config(given.time, given.width, given.heads)
    words = f"--width {given.width} --heads {given.heads} --time {given.time} --seed {given.seed}"
    command = f"python -m benchmarks.million {words} --json {given.json.name}"

    write = keeper(given.json, asdict(config), command=command, seed=given.seed)

    def keep(metrics: dict[str, Any]) -> None:
        name, found = list(metrics.items())[-1]
        print(name, found[-1] if isinstance(found, list) else found, flush=True)
        write(metrics)

    run(config, given.seed, keep)


if __name__ == "__main__":
    main()
