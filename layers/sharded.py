r"""A sequence whose parts are held by several devices in order, filtered exactly.

Every device finds what its part does to any belief that enters it, without knowing that belief;
these maps are composed across devices; every device then filters its part from the belief that it
starts with, and keeps what it reads. Nothing is approximated, and no device holds the whole.

**Exact.** A part's map is an element (A, b, C, η, J) (`layers.elements`). Filtered from a memory
known to be 0, the part leaves (b, C). A memory that is the identity, filtered with the same gains
and values 0, leaves A, and its innovations E, of variances s, say what the part sees of its start:

$$ J = \sum_t E_t E_t^\top / s_t,\quad \eta = -\sum_t e_t E_t^\top / s_t $$

with e the values' innovations. So one pass over the part in Joseph's form gives the element, and
the only solves are between devices.

**Others.** Under `Reset` gains are known at once, and a part is an affine map of the mean; under
`Restored` covariances go first, then means. `Additive` parts decay and add, key by key.

**Between devices** (N of them, E numbers an element: 3 K² + 2 V K when exact): each takes in all
elements, (N − 1) E numbers in one round, up to `GATHERED` devices, and beyond it those of a tree,
in 1 + ⌈log₂(N − 1)⌉ rounds of E numbers. Gradients send as many back, in reverse.
`layers.communication` has the formulas, and counts what compiled programs send.

**Kernels.** On GPUs that take them the exact filter does all this by kernels (`kernels.devices`)
where it drifts or decays, with one number a token for each, and keys are at most 64 wide. Elsewhere
what a part does is found in XLA, and the part is filtered by a kernel if there is one: with neither
drift nor decay the kernels' elements have too few digits, and there are none of wider keys, of
rates per key and of `Restored`.

Source: Särkkä & García-Fernández (2021), IEEE TAC 66(1); Blelloch (1990) for scans.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from .additive import Superposition, additive_scan
from .chunks import chunk_length, cut, join
from .delta import Writes, delta_scan
from .elements import Element, apply, combine
from .exchange import before
from .kernels import Backend, chosen, device_refusal, kept_whole, kernel_scan, refusal
from .precision import MeanDtype, cast, exact_product, state_dtype
from .rules import Additive, Exact, Reset, Restored, Rule
from .scans import (
    EXACT,
    Algorithm,
    additive_variance,
    by_write,
    check_widths,
    covariance_rates,
    filter_scan,
    floats,
    gains,
    initial_belief,
)
from .stream import Belief, Reading, Stream, one_by_one, per_key

SEQUENCE, HEADS, DATA = "sequence", "heads", "data"
"""Mesh axes along which layers are split: time, heads, and rows of a batch."""


def sharded_scan(
    stream: Stream,
    prior_variance: Float[Array, "*width"] | float = 1.0,
    rule: Rule = EXACT,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = SEQUENCE,
    initial: Belief | None = None,
    algorithm: Algorithm = "chunked",
    dtype: MeanDtype = "float32",
    backend: Backend = "auto",
) -> tuple[Belief, Reading]:
    """`layers.filter_scan` of a stream whose time is split over the devices of a mesh axis.

    Args:
        stream: with a time that is a multiple of the axis's devices; documents may cross borders.
        prior_variance: as for `filter_scan`, which this equals to rounding.
        rule: `Exact`, `Restored`, `Reset` or `Additive`.
        mesh: of devices; the one of `jax.set_mesh` where left out.
        axis: the mesh's axis that holds time. Other axes hold what `jax.vmap` is told that they do,
            by its `spmd_axis_name`.
        initial: belief before the first token; the prior where left out.
        algorithm: within each device.
        dtype: of the operands of products that carry values.
        backend: within each device, as for `filter_scan`.

    Returns:
        The belief after the last token, and readings that stay where their tokens are; with
        gradients for every array.

    Raises:
        ValueError: the mesh has no such axis, its devices do not divide the time, or the rule's
            parts are not known before what they start from.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis not in mesh.axis_names:
        has = ", ".join(map(str, mesh.axis_names)) or "none"
        raise ValueError(f"`axis` is {axis!r}, and the mesh's axes are {has}; name one of them.")
    reason = rule_refusal(rule)
    if reason is not None:
        raise ValueError(reason)
    devices, time = mesh.shape[axis], stream.length
    if time == 0 or time % devices:
        raise ValueError(
            f"`stream` has {time} tokens, no multiple of the {devices} devices of mesh axis "
            f"{axis!r}; pad it (`layers.packing.without_padding`) or split it over fewer."
        )
    value, key = stream.value.shape[-1], stream.key.shape[-1]
    state = state_dtype(*floats(stream, initial), prior_variance)
    prior_variance = jnp.asarray(prior_variance, state)
    start = initial
    if start is None:
        start = cast(initial_belief(rule, value, key, prior_variance), state)
    check_widths(stream, start)
    dials = (rule.restoration, rule.variance) if isinstance(rule, Restored) else ()
    dials = tuple(jnp.asarray(dial) for dial in dials)

    @partial(jax.checkpoint, policy=_kept)
    def part(stream, prior_variance, start, dials):
        last, reading = _part(
            stream,
            prior_variance,
            Restored(*dials) if dials else rule,
            start,
            axis,
            devices,
            algorithm,
            dtype,
            backend,
        )
        return jax.tree.map(lambda leaf: leaf[None], last), reading

    along, everywhere = PartitionSpec(axis), PartitionSpec()
    specs = along, everywhere, everywhere, tuple(along if d.ndim else everywhere for d in dials)
    lasts, reading = jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=(along, along), check_vma=False
    )(stream, prior_variance, start, dials)
    return jax.tree.map(lambda leaf: leaf[-1], lasts), reading


def rule_refusal(rule: Rule) -> str | None:
    """Why a rule's sequences are not split over devices; None where they are."""
    if isinstance(rule, Exact | Restored | Reset | Additive):
        return None
    return (
        f"`rule` is {rule}, and time is split over devices under Exact, Restored, Reset and "
        "Additive; leave the sequence on one device."
    )


def split_axis(axis: str, size: int | None = None) -> str | None:
    """The mesh axis of that name in `jax.set_mesh`'s mesh, if there is one that splits `size`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get(axis) != AxisType.Auto:  # absent, or inside a shard_map already
        return None
    return axis if size is None or size % mesh.shape[axis] == 0 else None


def _kept(primitive, *inputs, **parameters) -> bool:
    """Whether the gradient keeps what a primitive of the forward pass gives.

    All but slices, which may hold nothing: the partitioner of XLA in JAX 0.11.2 crashes on arrays
    without numbers that leave a `shard_map`, as `associative_scan` would have it keep.
    """
    return primitive.name != "slice" and all(array.size for array in inputs)


# -- on each device ------------------------------------------------------------------------------


def _part(stream, prior_variance, rule, initial, axis, devices, algorithm, dtype, backend):
    """The belief after a device's part, and the part's readings."""
    reason = refusal(stream, initial, prior_variance, rule, algorithm) or device_refusal()
    by_kernel = chosen(backend, reason)
    if devices > 1 and by_kernel and not kept_whole(stream, prior_variance, rule):
        assert isinstance(rule, Exact)
        return kernel_scan(stream, initial, prior_variance, rule, axis=axis)
    start = initial
    if devices > 1:
        # On the kernels' devices the tree over a part's chunks is as fast.
        start = _start(
            stream, prior_variance, rule, initial, axis, "parallel" if by_kernel else algorithm
        )
    return filter_scan(
        stream,
        prior_variance,
        rule,
        initial=start,
        algorithm=algorithm,
        dtype=dtype,
        backend=backend,
    )


def _start(stream, prior_variance, rule, initial: Belief, axis: str, algorithm) -> Belief:
    """The belief that a device's part starts with."""
    state = state_dtype(*floats(stream, initial), prior_variance)
    value, key = initial.mean.shape
    prior = cast(initial_belief(rule, value, key, prior_variance), state)
    initial, count = cast(initial, state), stream.observations
    stream, rule = cast(one_by_one(stream), state), by_write(rule, count, state)
    if isinstance(rule, Additive):
        return _additive_start(stream, initial, prior, axis, algorithm)
    covariance = None
    if isinstance(rule, Exact | Restored):
        element = element_of(stream, prior, rule, algorithm)
        assert initial.covariance is not None
        state = initial.mean, initial.covariance
        mean, covariance = before(axis, element, combine, _after, state)
        if isinstance(rule, Exact):
            return Belief(mean, covariance)
    log_decay = None if stream.log_decay is None else per_key(stream.log_decay)
    part = _means(stream, covariance, prior, rule, algorithm, log_decay)
    own = part.closed, part.written
    return Belief(before(axis, own, _in_turn, _moved, initial.mean), covariance)


def _after(element: Element, state: tuple[Array, Array]) -> tuple[Array, Array]:
    return apply(element, *state)


def _moved(part: tuple[Array, Array], mean: Array) -> Array:
    """A mean after a part (closed loop, what it writes)."""
    closed, written = part
    return exact_product(mean, closed) + written


def _in_turn(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    return exact_product(first[0], second[0]), _moved(second, first[1])


def element_of(stream: Stream, prior: Belief, rule: Rule, algorithm) -> Element:
    """What a part does to any belief; under `Restored`, to any covariance."""
    width = stream.key.shape[-1]
    known = jnp.zeros((width, width), stream.key.dtype)
    log_decay, _ = covariance_rates(stream, rule)
    part = _means(stream, known, prior, rule, algorithm, log_decay)
    assert part.covariance is not None
    own, seen = jnp.split(part.innovations, [len(prior.mean)], axis=-1)
    weighted = seen / part.spread[:, None]
    return Element(
        part.closed.T,
        part.written,
        part.covariance,
        -exact_product(own.T, weighted),
        exact_product(seen.T, weighted),
    )


class _Part(eqx.Module):
    """A part's means under the gains that follow from the covariance it starts with."""

    closed: Float[Array, "key key"]  # what it makes of a mean: mean @ closed + written
    written: Float[Array, "value key"]
    covariance: Float[Array, "key key"] | None
    innovations: Float[Array, "time row"]  # of the values from a mean of 0, and of the identity
    spread: Float[Array, " time"]  # their variances


def _means(stream: Stream, covariance, prior: Belief, rule: Rule, algorithm, log_decay) -> _Part:
    (rows, width), time, length = prior.mean.shape, stream.length, chunk_length(stream.length)
    begun = Belief(prior.mean, covariance)
    after, gain, spread, _ = gains(stream, begun, prior, rule, algorithm, length)
    unseen = jnp.zeros((time, width), stream.value.dtype)
    value = jnp.concatenate([stream.value, unseen], axis=-1)
    writes = Writes(stream.key, gain, value, stream.query, log_decay, stream.starts)
    chunks = jax.tree.map(lambda array: cut(array, length), writes)
    identity = jnp.eye(width, dtype=prior.mean.dtype)
    stacked = jnp.concatenate([jnp.zeros_like(prior.mean), identity])
    with jax.default_matmul_precision("highest"):  # covariances follow from these means
        last, _, innovations = delta_scan(stacked, chunks, algorithm)
    return _Part(last[rows:], last[:rows], after, join(innovations, time), spread)


def _additive_start(stream: Stream, initial: Belief, prior: Belief, axis: str, algorithm) -> Belief:
    assert prior.covariance is not None
    length = chunk_length(stream.length)
    log_decay = None if stream.log_decay is None else per_key(stream.log_decay)
    parts = Superposition(stream.key, stream.value, stream.query, log_decay, stream.starts)
    chunks = jax.tree.map(lambda array: cut(array, length), parts)
    assert prior.covariance is not None
    none = Belief(jnp.zeros_like(initial.mean), jnp.zeros_like(prior.covariance))
    written, _ = additive_scan(none.mean, chunks, algorithm)
    added, _ = additive_variance(stream, none, prior)
    kept = jnp.ones_like(added)
    if log_decay is not None:
        kept = kept * jnp.exp(jnp.sum(log_decay, axis=0))
    if stream.starts is not None:
        kept = jnp.where(jnp.any(stream.starts), 0, kept)

    def after(part, belief: Belief) -> Belief:
        kept, done = part
        assert belief.covariance is not None
        return Belief(belief.mean * kept + done.mean, belief.covariance * kept**2 + done.covariance)

    def in_turn(first, second):
        return first[0] * second[0], after(second, first[1])

    return before(axis, (kept, Belief(written, added)), in_turn, after, initial)
