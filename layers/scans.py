"""One signature for every rule and algorithm: a stream in, readings and the last belief out."""

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import information
from .additive import Superposition, additive_scan, chunk_states
from .chunks import chunk_length, cut, join
from .covariance import Uncertainty, covariance_scan
from .delta import Writes, delta_scan
from .kernels import (
    Backend,
    chosen,
    delta_refusal,
    delta_rule,
    device_refusal,
    kernel_scan,
    refusal,
)
from .precision import MeanDtype, cast, state_dtype
from .rules import Additive, Diagonal, Exact, Forget, Isotropic, Reset, Restored, Rule
from .stream import Belief, Reading, Stream, by_token, one_by_one, per_key
from .token import log_density, token_scan
from .variances import diagonal_variances, isotropic_variances

Algorithm = Literal["token", "chunked", "parallel"]
EXACT = Exact()


def initial_belief(
    rule: Rule, value_width: int, key_width: int, prior_variance: Float[Array, "*width"] | float
) -> Belief:
    """The belief that a memory starts with: mean 0, and the prior variance as `rule` keeps it."""
    variance = jnp.asarray(prior_variance, jnp.result_type(float))
    mean = jnp.zeros((value_width, key_width), variance.dtype)
    match rule:
        case Reset():
            return Belief(mean, None)
        case Isotropic():
            return Belief(mean, jnp.mean(variance))
        case Diagonal() | Additive():
            return Belief(mean, jnp.broadcast_to(variance, (key_width,)))
        case _:
            return Belief(mean, jnp.eye(key_width, dtype=variance.dtype) * variance)


def filter_scan(
    stream: Stream,
    prior_variance: Float[Array, "*width"] | float = 1.0,
    rule: Rule = EXACT,
    *,
    initial: Belief | None = None,
    algorithm: Algorithm = "chunked",
    dtype: MeanDtype = "float32",
    backend: Backend = "auto",
) -> tuple[Belief, Reading]:
    """Filter a stream.

    Args:
        stream: what is written and read.
        prior_variance: of every entry, or one per key, of a memory of mean 0 from which documents
            start, and towards which `Forget` fades.
        rule: what is done to the covariance.
        initial: belief before the first token, as an earlier call returned it; the prior where
            left out.
        algorithm: "token" is the definition, one `lax.scan` step a token; "chunked" makes matrix
            products of 64 tokens at a time; "parallel" also combines the chunks in a tree, for
            few heads and long sequences on a wide device.
        dtype: of the operands of products that carry values (`layers.precision`).
        backend: "mosaic" runs the kernels of `layers.kernels`, which take the exact filter and
            `Restored` in chunks, with keys up to 128 and values up to or a multiple of 64 wide, on
            Hopper GPUs; where decay or drift is per key, keys up to 64 of the exact filter. "auto"
            runs them where they apply, and else XLA.
            Means of a reset filter in bfloat16 come from jax-linear-attention's kernels there,
            where it is installed; "xla" is without.

    Returns:
        The belief after the last token and every token's reading: the same for each algorithm to
        rounding, with gradients for every array.

    Raises:
        ValueError: widths disagree, the rule does not take several observations a token, or
            `backend` is "mosaic" and no kernel applies.
    """
    prior = initial_belief(rule, stream.value.shape[-1], stream.key.shape[-1], prior_variance)
    state = state_dtype(*floats(stream, initial), prior_variance)
    start = prior if initial is None else initial
    check_widths(stream, start)
    reason = refusal(stream, start, prior_variance, rule, algorithm) or device_refusal()
    if chosen(backend, reason):
        assert isinstance(rule, Exact | Restored)
        return kernel_scan(stream, start, prior_variance, rule)
    count = stream.observations
    if count > 1 and isinstance(rule, Diagonal | Isotropic):
        raise ValueError(
            f"`rule` is {rule}, which takes one observation a token; this stream has {count}."
        )
    given = stream
    rule = by_write(rule, count, state)
    stream, start, prior = (cast(tree, state) for tree in (one_by_one(stream), start, prior))
    if algorithm == "token" or stream.length == 0:
        last, reading = token_scan(stream, start, prior, rule)
    else:
        last, reading = _in_chunks(stream, start, prior, rule, algorithm, dtype)
    reason = delta_refusal(given, rule, algorithm) or device_refusal()
    if backend == "auto" and reason is None and isinstance(rule, Reset):
        # What is left of the scan above is compiled away where nothing reads its log evidence.
        outputs, mean = delta_rule(given, start.mean, rule.variance)
        return Belief(mean, None), replace(reading, mean=outputs)
    return last, by_token(reading, count)


def by_write(rule: Rule, count: int, dtype) -> Rule:
    """A rule for `one_by_one` of a stream with `count` observations a token."""
    if not isinstance(rule, Restored):
        return rule
    parts = (jnp.asarray(part, dtype) for part in (rule.restoration, rule.variance))
    return Restored(*(jnp.repeat(part, count) if part.ndim else part for part in parts))


def check_widths(stream: Stream, initial: Belief) -> None:
    """Raise ValueError unless the stream's widths are those of the memory."""
    value, key = initial.mean.shape
    for name, array, width in (
        ("key", stream.key, key),
        ("query", stream.query, key),
        ("value", stream.value, value),
    ):
        if array.shape[-1] != width:
            raise ValueError(
                f"`{name}` is {array.shape}, but the memory is (value {value}, key {key}); "
                f"its last axis must be {width}."
            )


def floats(*trees) -> list[Array]:
    """The floating-point arrays of trees."""
    leaves = jax.tree.leaves(trees)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _in_chunks(
    stream: Stream, initial: Belief, prior: Belief, rule: Rule, algorithm, dtype: MeanDtype
) -> tuple[Belief, Reading]:
    time = stream.length
    length = chunk_length(time)

    def cut_all(tree):
        return jax.tree.map(lambda array: cut(array, length), tree)

    log_decay = None if stream.log_decay is None else per_key(stream.log_decay)
    if isinstance(rule, Additive):
        parts = Superposition(stream.key, stream.value, stream.query, log_decay, stream.starts)
        mean, outputs = additive_scan(initial.mean, cut_all(parts), algorithm, dtype)
        variance, read = additive_variance(stream, initial, prior)
        reading = Reading(join(outputs, time), read, jnp.zeros_like(read))
        return Belief(mean, variance), reading
    if isinstance(rule, Forget):
        return information.forget_scan(stream, initial, prior, algorithm, length)
    covariance, gain, innovation_variance, read_variance = gains(
        stream, initial, prior, rule, algorithm, length
    )
    writes = Writes(stream.key, gain, stream.value, stream.query, log_decay, stream.starts)
    mean, outputs, innovations = delta_scan(initial.mean, cut_all(writes), algorithm, dtype)
    evidence = log_density(join(innovations, time), innovation_variance)
    return Belief(mean, covariance), Reading(join(outputs, time), read_variance, evidence)


def gains(stream: Stream, initial: Belief, prior: Belief, rule: Rule, algorithm, length: int):
    """Last covariance; every token's gain, innovation variance and read-out variance."""
    match rule:
        case Reset(variance):
            return None, *_reset_gains(stream, variance)
        case Diagonal(count):
            before, after = diagonal_variances(stream, initial, prior, count)
        case Isotropic(count):
            before, after = isotropic_variances(stream, initial, prior, count)
        case _:
            return _exact_gains(stream, initial, prior, rule, algorithm, length)
    innovation_variance = jnp.sum(before * stream.key**2, axis=-1) + stream.noise
    gain = before * stream.key / innovation_variance[:, None]
    read = jnp.sum(after * stream.query**2, axis=-1)
    last = after[-1] if isinstance(rule, Diagonal) else after[-1, 0]
    return last, gain, innovation_variance, read


def _reset_gains(stream: Stream, variance: float):
    innovation_variance = variance * jnp.sum(stream.key**2, axis=-1) + stream.noise
    gain = variance * stream.key / innovation_variance[:, None]
    tied = variance * jnp.sum(stream.query * stream.key, axis=-1)
    read = variance * jnp.sum(stream.query**2, axis=-1) - tied**2 / innovation_variance
    return gain, innovation_variance, read


def _exact_gains(stream: Stream, initial: Belief, prior: Belief, rule, algorithm, length: int):
    assert initial.covariance is not None
    log_decay, drift = covariance_rates(stream, rule)
    restart = None
    if stream.starts is not None:
        assert prior.covariance is not None
        scale = (
            jnp.ones((stream.length, 1), stream.key.dtype)
            if log_decay is None
            else jnp.exp(2 * log_decay)
        )
        restart = scale * jnp.diagonal(prior.covariance) + (0 if drift is None else drift)
    chunks = Uncertainty(
        cut(stream.key, length),
        cut(stream.query, length),
        cut(stream.noise, length, 1.0),
        None if log_decay is None else cut(log_decay, length),
        None if drift is None else cut(drift, length),
        None if stream.starts is None else cut(stream.starts, length),
        None if restart is None else cut(restart, length),
    )
    last, gains = covariance_scan(initial.covariance, chunks, algorithm)
    time = stream.length
    return (
        last,
        join(gains.gain, time),
        join(gains.innovation_variance, time),
        join(gains.read_variance, time),
    )


def covariance_rates(stream: Stream, rule: Rule):
    """Log decay and drift of the covariance, (time, 1) or (time, key), or None."""
    log_decay = None if stream.log_decay is None else per_key(stream.log_decay)
    drift = None if stream.drift is None else per_key(stream.drift)
    if isinstance(rule, Restored):
        # λ = 0 is reached to rounding: √λ has no derivative there, what depends on it has.
        tiny = jnp.finfo(stream.key.dtype).eps
        kept = tiny + (1 - tiny) * jnp.broadcast_to(rule.restoration, (stream.length,))[:, None]
        variance = jnp.broadcast_to(rule.variance, (stream.length,))[:, None]
        drift = (0 if drift is None else kept * drift) + (1 - kept) * variance
        log_decay = (0 if log_decay is None else log_decay) + jnp.log(kept) / 2
    return log_decay, drift


def additive_variance(stream: Stream, initial: Belief, prior: Belief):
    """Variance after the last token, and of every read-out: P = a²P + q r/(q + r)."""
    time = stream.length
    assert initial.covariance is not None
    width = stream.key.shape[-1]
    kept = jnp.ones((time, width), stream.key.dtype)
    if stream.log_decay is not None:
        kept = kept * jnp.exp(2 * per_key(stream.log_decay))
    added = jnp.zeros((time, width), stream.key.dtype)
    if stream.drift is not None:
        drift, noise = per_key(stream.drift), stream.noise[:, None]
        added = added + drift * noise / (drift + noise)
    if stream.starts is not None:
        assert prior.covariance is not None
        starts = stream.starts[:, None]
        added = jnp.where(starts, kept * prior.covariance + added, added)
        kept = jnp.where(starts, 0, kept)
    _, before = chunk_states(initial.covariance, kept, added, "parallel")
    after = kept * before + added
    return after[-1], jnp.sum(after * stream.query**2, axis=-1)
