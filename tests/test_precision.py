"""The float32 chunked path against the same code in float64, over 16,384 tokens.

Keys have norm 1 and cosine .9 with each other, values are drawn from the model. Worst seen over
twelve draws, relative to the largest entry of the float64 result: means 7.1e-5 at a prior variance
over noise of 1e3 and 3.2e-4 at 1e4, within the first 100 tokens, where the covariance falls from
the prior's to the noise's; it grows as the root of the ratio. Final covariances 7.4e-4 at 1e4 where
the memory decays and never drifts, and 1e-4 elsewhere.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.chunks import cut
from layers.covariance import Uncertainty, through_chunk
from layers.precision import LARGEST_RATIO
from layers.scans import filter_scan
from layers.stream import Stream, per_key

TIME, VALUE, DECAY, DRIFT = 16_384, 4, 0.999, 1e-4
TOLERANCE = {1.0: 1e-4, 1e3: 1e-4, LARGEST_RATIO: 1e-3}


def model_stream(width: int, rates: str, ratio: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Correlated keys, and values drawn from the model with prior variance 1."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        rows = rng.normal(size=shape)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    common = unit(width)
    own = unit(TIME, width)
    own -= (own @ common)[:, None] * common
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    key = np.sqrt(0.9) * common + np.sqrt(0.1) * own
    decay = 1.0 if rates == "none" else DECAY
    drift = DRIFT if rates in ("drift", "per key") else 0.0
    memory = rng.normal(size=(VALUE, width))
    value = rng.normal(size=(TIME, VALUE)) / np.sqrt(ratio)
    for t in range(TIME):
        memory = memory * decay + np.sqrt(drift) * rng.normal(size=memory.shape)
        value[t] += memory @ key[t]
    parts = {"key": key, "value": value, "query": unit(TIME, width)}
    parts["noise"] = np.full(TIME, 1 / ratio)
    shape = (TIME, width) if rates == "per key" else (TIME,)
    if rates != "none":
        parts["log_decay"] = np.full(shape, np.log(DECAY))
    if drift:
        parts["drift"] = np.full(shape, DRIFT)
    return parts


@jax.jit
def filtered(stream: Stream):
    """What is compared, and the covariance at every chunk's start."""
    one = jnp.ones((), stream.key.dtype)
    last, reading = filter_scan(stream, one)
    chunks = Uncertainty(
        cut(stream.key, 64),
        cut(stream.query, 64),
        cut(stream.noise, 64),
        None if stream.log_decay is None else cut(per_key(stream.log_decay), 64),
        None if stream.drift is None else cut(per_key(stream.drift), 64),
        None,
        None,
    )
    prior = jnp.eye(stream.key.shape[-1], dtype=stream.key.dtype)
    _, starts = jax.lax.scan(lambda p, chunk: (through_chunk(p, chunk)[0], p), prior, chunks)
    compared = {
        "mean": reading.mean,
        "variance": reading.variance,
        "last mean": last.mean,
        "last covariance": last.covariance,
    }
    return compared, starts


@cache
def results(width: int, rates: str, ratio: float):
    """Results in float32 and in float64."""
    parts = model_stream(width, rates, ratio)
    found = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            stream = Stream(**{name: jnp.asarray(part, dtype) for name, part in parts.items()})
            assert stream.key.dtype == dtype
            found.append(jax.tree.map(np.asarray, filtered(stream)))
    return found


CASES = [
    (width, rates, ratio)
    for width in (16, 64)
    for rates in ("none", "decay", "drift", "per key")
    for ratio in TOLERANCE
    if rates != "drift" or width == 16
]


@pytest.mark.parametrize(("width", "rates", "ratio"), CASES)
def test_float32_is_close_to_float64(width, rates, ratio):
    (rounded, _), (exact, _) = results(width, rates, ratio)
    for name, part in exact.items():
        worst = np.abs(rounded[name].astype(float) - part).max() / np.abs(part).max()
        assert worst <= TOLERANCE[ratio], f"{name}: {worst:.1e}"


@pytest.mark.parametrize(("width", "rates", "ratio"), CASES)
def test_covariances_stay_definite(width, rates, ratio):
    (compared, starts), _ = results(width, rates, ratio)
    for covariances in (starts, compared["last covariance"][None]):
        assert np.linalg.eigvalsh(covariances.astype(float))[:, 0].min() > 0
