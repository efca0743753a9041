"""Speed and memory of the scans, side by side with a peer in one run, as ratios."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from layers import Additive, Stream, filter_scan
from layers.kernels import Backend
from layers.rules import Exact, Reset, Rule
from layers.scans import Algorithm

REPEATS = 7
PEER = "jax-linear-attention 0.1.0, chunked"


@dataclass(frozen=True)
class Shape:
    """Batch, time, heads, and the width of keys and values."""

    batch: int
    time: int
    heads: int
    width: int


@dataclass(frozen=True)
class Contender:
    """One way to compute a filter; `peer` names the other package's operation instead."""

    label: str
    rule: Rule
    algorithm: Algorithm = "chunked"
    backend: Backend = "auto"
    decay: str = "scalar"
    drift: bool = False
    peer: str = ""


@dataclass(frozen=True)
class Comparison:
    """Contenders on one shape; times are divided by the first one's."""

    name: str
    shape: Shape
    contenders: tuple[Contender, ...]
    gradient: bool = True


@dataclass(frozen=True)
class Timing:
    """Milliseconds, medians over repeats; temporary memory of the gradient in MB."""

    comparison: str
    contender: str
    shape: Shape
    forward_ms: float
    gradient_ms: float | None
    memory_mb: float | None
    forward_ratio: float
    gradient_ratio: float | None
    memory_ratio: float | None


_EXACT = Contender("Bayesian Layer, chunked", Exact(), drift=True)
_DELTA = Contender("gated delta rule", Reset(1.0))
_PEER_DELTA = Contender(PEER, Exact(), peer="gated_deltanet")
_CPU = Shape(2, 2048, 4, 64)

COMPARISONS = (
    Comparison(
        "exact",
        _CPU,
        (
            _EXACT,
            Contender("Bayesian Layer, token by token", Exact(), algorithm="token", drift=True),
        ),
    ),
    Comparison("delta", _CPU, (_PEER_DELTA, _DELTA, _EXACT)),
    Comparison(
        "ssd", _CPU, (Contender(PEER, Exact(), peer="simple_gla"), Contender("SSD", Additive()))
    ),
    Comparison(
        "gla",
        _CPU,
        (
            Contender(PEER, Exact(), peer="gla", decay="key"),
            Contender("GLA", Additive(), decay="key"),
        ),
    ),
    Comparison(
        "kda",
        _CPU,
        (
            Contender(PEER, Exact(), peer="kda", decay="key"),
            Contender("KDA", Reset(1.0), decay="key"),
        ),
    ),
    Comparison("length", Shape(1, 2048, 1, 64), (_EXACT,), gradient=False),
    Comparison("length", Shape(1, 65536, 1, 64), (_EXACT,), gradient=False),
    Comparison(
        "parallel",
        Shape(1, 131072, 4, 64),
        (
            Contender("Bayesian Layer, chunked, XLA", Exact(), backend="xla", drift=True),
            Contender(
                "Bayesian Layer, parallel in time", Exact(), algorithm="parallel", drift=True
            ),
            _EXACT,
        ),
    ),
)
"""What is compared; "parallel" is meant for a GPU and is left out on a CPU unless named."""


def run(
    names: Sequence[str],
    *,
    seed: int = 0,
    repeats: int = REPEATS,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Timing]:
    """Time the comparisons of these names; none: all that suit the device."""
    on_cpu = jax.default_backend() == "cpu"
    timings: list[Timing] = []
    for comparison in COMPARISONS:
        wanted = (
            comparison.name in names if names else not (on_cpu and comparison.name == "parallel")
        )
        if wanted:
            timings += _compare(comparison, seed, repeats, progress)
    return timings


def _compare(comparison: Comparison, seed: int, repeats: int, progress) -> list[Timing]:
    timings: list[Timing] = []
    for contender in comparison.contenders:
        if contender.peer and importlib.util.find_spec("jla") is None:
            continue
        progress(f"{comparison.name}: {contender.label}")
        streams = _streams(comparison.shape, contender, jax.random.key(seed))
        run = _peer(contender, comparison.shape) if contender.peer else _own(contender)
        forward = _milliseconds(jax.jit(run), streams, repeats)
        gradient = memory = None
        if comparison.gradient:

            def loss(streams: Stream, run=run) -> Array:
                return jnp.sum(jnp.square(run(streams)[0]))

            compiled = jax.jit(jax.value_and_grad(loss)).lower(streams).compile()
            gradient = _milliseconds(compiled, streams, repeats)
            analysis = compiled.memory_analysis()
            memory = None if analysis is None else analysis.temp_size_in_bytes / 1e6
        first = timings[0] if timings else None
        timings.append(
            Timing(
                comparison.name,
                contender.label,
                comparison.shape,
                forward,
                gradient,
                memory,
                1.0 if first is None else forward / first.forward_ms,
                _ratio(gradient, first and first.gradient_ms),
                _ratio(memory, first and first.memory_mb),
            )
        )
    return timings


def _ratio(number: float | None, first: float | None) -> float | None:
    if number is None:
        return None
    return 1.0 if first is None else number / first


def _own(contender: Contender) -> Callable[[Stream], tuple[Array, ...]]:
    def head(stream: Stream) -> tuple[Array, ...]:
        _, reading = filter_scan(
            stream,
            1.0,
            contender.rule,
            algorithm=contender.algorithm,
            backend=contender.backend,
        )
        if contender.rule == Exact():
            return reading.mean, reading.variance
        return (reading.mean,)

    return jax.vmap(head)


def _peer(contender: Contender, shape: Shape) -> Callable[[Stream], tuple[Array, ...]]:
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    def by_head(array: Array | None) -> Array:
        assert array is not None
        split = array.reshape(shape.batch, shape.heads, *array.shape[1:])
        return jnp.swapaxes(split, 1, 2)

    def run(streams: Stream) -> tuple[Array, ...]:
        arguments = {"g": by_head(streams.log_decay)}
        if contender.peer in ("gated_deltanet", "kda"):
            arguments["beta"] = by_head(1 / (1 + streams.noise))
        tokens = (by_head(part) for part in (streams.query, streams.key, streams.value))
        output, _ = linear_attention(
            contender.peer, *tokens, impl="chunked", scale=1.0, **arguments
        )
        return (output,)

    return run


def _streams(shape: Shape, contender: Contender, rng: PRNGKeyArray) -> Stream:
    """One stream for each head of each row: unit keys, decays near 1, noise around 0.2."""
    rngs = jax.random.split(rng, 5)
    rows = shape.batch * shape.heads
    vectors = (rows, shape.time, shape.width)
    key = jax.random.normal(rngs[0], vectors)
    width = vectors if contender.decay == "key" else vectors[:2]
    return Stream(
        key / jnp.linalg.norm(key, axis=-1, keepdims=True),
        jax.random.normal(rngs[1], vectors),
        jax.random.normal(rngs[2], vectors) / shape.width**0.5,
        jax.random.uniform(rngs[3], vectors[:2], minval=0.05, maxval=0.5),
        jnp.log(jax.random.uniform(rngs[4], width, minval=0.95, maxval=1.0)),
        jnp.full(vectors[:2], 0.01) if contender.drift else None,
    )


def _milliseconds(function: Callable[[Stream], Any], streams: Stream, repeats: int) -> float:
    jax.block_until_ready(function(streams))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(streams))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def as_records(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Timings as plain data."""
    return [asdict(timing) for timing in timings]
