"""Float32 scans against the same code in float64, over 16,384 tokens.

Keys have norm 1 and cosine .9 with each other, values are drawn from the model, and both dtypes get
the same rounded inputs. In chunks, worst seen over twelve draws at a prior variance over noise of
1e4, relative to the largest entry of the float64 result: means 5.3e-5, variances of read-outs
4.5e-6, final covariances 2.5e-4 (of 64 keys that decay and never drift). Token by token means reach
5.3e-5, too.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.precision import LARGEST_RATIO
from layers.scans import filter_scan
from layers.stream import Stream

VALUE, DECAY, DRIFT = 4, 0.999, 1e-4
WINDOW = 64
"""A chunk: what a scan over windows holds between them is the covariance at each chunk's start."""

RATES = ("none", "decay", "drift")
RATIOS = (1.0, 1e3, LARGEST_RATIO, 10 * LARGEST_RATIO)
"""Of prior variance over noise; the last is out of range."""


def model_streams(time: int, width: int, per_key: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Streams of every rate and ratio in turn; prior variance 1, and a second document."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        rows = rng.normal(size=shape)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    common = unit(width)
    own = unit(time, width)
    own -= (own @ common)[:, None] * common
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    key = np.sqrt(0.9) * common + np.sqrt(0.1) * own
    noise, query = rng.normal(size=(time, VALUE)), unit(time, width)
    shape = (time, width) if per_key else (time,)
    streams = []
    for rates in RATES[-1:] if per_key else RATES:
        decay = 1.0 if rates == "none" else DECAY
        drift = DRIFT if rates == "drift" else 0.0
        memory = rng.normal(size=(VALUE, width))
        value = np.empty((time, VALUE))
        for t in range(time):
            memory = memory * decay
            if drift:
                memory = memory + np.sqrt(drift) * rng.normal(size=memory.shape)
            value[t] = memory @ key[t]
        streams += [
            {
                "key": key,
                "value": value + noise / np.sqrt(ratio),
                "query": query,
                "noise": np.full(time, 1 / ratio),
                "log_decay": np.full(shape, np.log(decay)),
                "drift": np.full(shape, drift),
                "starts": np.arange(time) == 100,
            }
            for ratio in RATIOS
        ]
    return {name: np.stack([stream[name] for stream in streams]) for name in streams[0]}


def chunked(stream: Stream):
    """Every window's reading, the belief after the last, and the covariance after each."""

    def body(belief, window):
        belief, reading = filter_scan(window, initial=belief)
        return belief, (reading, belief.covariance)

    first, _ = filter_scan(jax.tree.map(lambda part: part[:0], stream))
    windows = jax.tree.map(lambda part: part.reshape(-1, WINDOW, *part.shape[1:]), stream)
    last, (reading, covariances) = jax.lax.scan(body, first, windows)
    return reading, last, covariances


def parallel(stream: Stream):
    last, reading = filter_scan(stream, algorithm="parallel")
    return reading, last, last.covariance[None]


@cache
def results(algorithm, time: int, width: int, per_key: bool):
    """Results in float32 and in float64, by stream."""
    streams = model_streams(time, width, per_key)
    starts = {"starts": streams.pop("starts")}
    rounded = {name: part.astype("float32") for name, part in streams.items()}

    @jax.jit
    @jax.vmap
    def run(parts):
        return algorithm(Stream(**parts))

    found = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            cast = {name: jnp.asarray(part, dtype) for name, part in rounded.items()}
            found.append(jax.tree.map(np.asarray, run(cast | starts)))
            assert found[-1][0].mean.dtype == dtype
    return found


CASES = [
    pytest.param(
        *case,
        marks=[
            pytest.mark.xdist_group(f"precision {case[1:]}"),  # share results
            *([pytest.mark.exhaustive] * (case[0] is chunked)),
        ],
    )
    for case in (
        (chunked, 16_384, 64, False),
        (chunked, 16_384, 16, False),
        (chunked, 16_384, 16, True),
        (parallel, 320, 64, False),
    )
]
TOLERANCE = {chunked: 1e-4, parallel: 3e-4}


@pytest.mark.parametrize(("algorithm", "time", "width", "per_key"), CASES)
def test_float32_is_close_to_float64_within_the_range(algorithm, time, width, per_key):
    (reading, last, _), (exact, exact_last, _) = results(algorithm, time, width, per_key)
    pairs = [(reading.mean, exact.mean), (reading.variance, exact.variance)]
    pairs += [(last.mean, exact_last.mean)]
    if algorithm is chunked:
        pairs += [(last.covariance, exact_last.covariance)]
    for rounded, part in pairs:
        for index, (own, other) in enumerate(zip(rounded, part, strict=True)):
            if RATIOS[index % len(RATIOS)] <= LARGEST_RATIO:
                worst = np.abs(own - other).max() / np.abs(other).max()
                assert worst <= TOLERANCE[algorithm]


@pytest.mark.parametrize(("algorithm", "time", "width", "per_key"), CASES)
def test_covariances_stay_definite(algorithm, time, width, per_key):
    """In chunks also beyond the range, where nothing is NaN."""
    (reading, _, covariances), _ = results(algorithm, time, width, per_key)
    for index in range(len(covariances)):
        if algorithm is chunked or RATIOS[index % len(RATIOS)] <= LARGEST_RATIO:
            assert np.linalg.eigvalsh(covariances[index].astype(float)).min() > 0
            assert np.isfinite(reading.mean[index]).all()
