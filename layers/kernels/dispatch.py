"""Which filters run as kernels: what their tests cover, on the devices they are written for."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.rules import Exact, Restored, Rule
from layers.stream import Belief, Reading, Stream, by_token, one_by_one, per_key

Backend = Literal["auto", "xla", "mosaic"]
EXACT = Exact()

WIDTH, CHUNK = 64, 64
KEYS = 128
"""The widest keys of a kernel."""
CAPABILITY = "9.0"
"""CUDA compute capability of Hopper GPUs, the only ones whose instructions the kernels use."""


def refusal(
    stream: Stream,
    initial: Belief,
    prior_variance: Float[Array, "*width"] | float,
    rule: Rule,
    algorithm: str,
) -> str | None:
    """Why no kernel takes this filter: argument, value, what is needed; None where one does."""
    value, key = initial.mean.shape
    dial = (rule.restoration, rule.variance) if isinstance(rule, Restored) else ()
    leaves = jax.tree.leaves((stream, initial, dial))
    arrays = [leaf for leaf in leaves if not isinstance(leaf, float)]
    types = {str(leaf.dtype) for leaf in arrays} - {"float32", "bfloat16", "bool"}
    varied = per_key_rates(stream, prior_variance)
    if not isinstance(rule, Exact | Restored):
        return f"`rule` is {rule}, and kernels take Exact() and Restored"
    if algorithm != "chunked":
        return f'`algorithm` is "{algorithm}", and kernels take "chunked"'
    if not (0 < key <= KEYS and (0 < value <= WIDTH or value % WIDTH == 0)):
        return (
            f"the memory is (value {value}, key {key}), and kernels take at most {KEYS} keys, "
            f"and at most {WIDTH} values or a multiple"
        )
    if stream.length == 0:
        return "`stream` has no tokens, and kernels take one or more"
    if varied and isinstance(rule, Restored):
        return f"`{varied[0]}` is one number per key, and kernels restore what has one a token"
    if varied and key > WIDTH:
        return f"`{varied[0]}` is one number per key, for which kernels take at most {WIDTH} keys"
    if types:
        return f"an array is {min(types)}, and kernels take float32 and bfloat16"
    return None


def per_key_rates(stream: Stream, prior_variance: Float[Array, "*width"] | float) -> list[str]:
    """Names of the rates that are one number per key."""
    rates = {"log_decay": stream.log_decay, "drift": stream.drift}
    varied = [name for name, rate in rates.items() if rate is not None and rate.ndim > 1]
    if stream.starts is not None and jnp.ndim(prior_variance) > 0:
        varied.append("prior_variance")
    return varied


def kept_whole(stream: Stream, prior_variance: Float[Array, "*width"] | float, rule: Rule) -> bool:
    """Whether kernels do not find what a part does to any belief, or with too few digits."""
    lasting = stream.log_decay is None and stream.drift is None
    wide = stream.key.shape[-1] > WIDTH
    return (
        lasting or wide or isinstance(rule, Restored) or bool(per_key_rates(stream, prior_variance))
    )


def device_refusal() -> str | None:
    """Why the device that programs run on takes no kernel; None where it does."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and str(capability) == CAPABILITY:
        return None
    found = device.device_kind if capability is None else f"{device.device_kind} ({capability})"
    return f"the device is {found}, and kernels run on Hopper GPUs, of capability {CAPABILITY}"


def chosen(backend: Backend, reason: str | None) -> bool:
    """Whether a kernel runs, given why it cannot.

    Raises:
        ValueError: "mosaic" is asked for and cannot run, or `backend` is none of the three.
    """
    if backend not in ("auto", "xla", "mosaic"):
        raise ValueError(f'`backend` is {backend!r}; it must be "auto", "xla" or "mosaic".')
    if backend == "mosaic" and reason is not None:
        raise ValueError(f'`backend` is "mosaic", but {reason}; leave it at "auto" to use XLA.')
    return backend != "xla" and reason is None


def kernel_scan(
    stream: Stream,
    initial: Belief,
    prior_variance: Float[Array, "*width"] | float,
    rule: Exact | Restored = EXACT,
    *,
    axis: str | None = None,
    interpret: bool = False,
) -> tuple[Belief, Reading]:
    """`layers.filter_scan` of a filter that `refusal` does not refuse.

    Args:
        stream: keys, values and queries that are all bfloat16 stay so; else all are float32.
        initial: belief before the first token.
        prior_variance: from which documents start.
        rule: what is done to the covariance.
        axis: mesh axis whose devices hold parts of the sequence in order, inside `jax.shard_map`,
            where `kept_whole` does not hold; the last belief is that after the device's own part.
        interpret: whether kernels are simulated on a CPU.
    """
    # Mosaic is imported where it is used alone.
    from .exact import filter_head
    from .head import Filtered, Head
    from .keywise_head import filter_keywise_head
    from .segments import padded as filled_up

    covariance = initial.covariance
    assert covariance is not None
    count, stream = stream.observations, one_by_one(stream)
    f32, time = jnp.float32, stream.length
    vectors = stream.key, stream.value, stream.query
    keywise = bool(per_key_rates(stream, prior_variance))
    half = not keywise and all(part.dtype == jnp.bfloat16 for part in vectors)
    key, value, query = (part if half else part.astype(f32) for part in vectors)

    def rate(given):
        given = jnp.zeros((time,), f32) if given is None else given.astype(f32)
        return jnp.broadcast_to(per_key(given), key.shape) if keywise else given

    log_decay, drift = rate(stream.log_decay), rate(stream.drift)
    starts, added = jnp.zeros((time,), bool), drift
    whole = kept_whole(stream, prior_variance, rule)
    length = time + -time % CHUNK if whole else filled_up(time)
    if stream.starts is not None:
        starts = stream.starts
        restart = jnp.exp(2 * log_decay) * jnp.asarray(prior_variance, f32) + drift
        added = jnp.where(starts[:, None] if keywise else starts, restart, drift)
    kept = None
    if isinstance(rule, Restored):
        kept = jnp.asarray(rule.restoration, f32)
        kept = jnp.broadcast_to(kept if kept.ndim == 0 else jnp.repeat(kept, count), (time,))
        added = kept * added + (1 - kept) * jnp.asarray(rule.variance, f32)

    def padded(array, filler=0):
        padding = [(0, -width % WIDTH) for width in array.shape[1:]]
        padding = [(0, length - time), *padding]
        return jnp.pad(array, padding, constant_values=filler)

    def square(state):
        """Keys that are never written or read, and values that are 0, change no others."""
        return jnp.pad(state, [(0, -width % WIDTH) for width in state.shape]).astype(f32)

    def rows_of(value, mean) -> Filtered:
        """What up to 64 rows of the memory say; rows share a covariance, and know of no others."""
        head = Head(
            padded(key),
            padded(value),
            padded(query),
            padded(stream.noise.astype(f32), 1),
            padded(log_decay),
            padded(starts, False),
            padded(added),
            square(covariance),
            square(mean),
            None if kept is None else padded(kept, 1),
        )
        if keywise:
            return filter_keywise_head(head, len(mean), interpret)
        return filter_head(head, len(mean), interpret, whole, axis)

    rows, width = min(WIDTH, value.shape[-1]), key.shape[-1]
    values = jnp.moveaxis(value.reshape(time, -1, rows), 1, 0)
    found = jax.vmap(rows_of)(values, initial.mean.reshape(-1, rows, width))
    reading = Reading(
        jnp.moveaxis(found.mean[:, :time, :rows], 0, 1).reshape(time, -1),
        found.variance[0, :time],
        found.log_evidence[:, :time].sum(axis=0),
    )
    mean = found.last_mean[:, :rows, :width].reshape(initial.mean.shape)
    return Belief(mean, found.last_covariance[0, :width, :width]), by_token(reading, count)
