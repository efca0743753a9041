"""Devices of a run as a mesh: rows of a batch, heads, and time, each split over an axis.

    mbd train mqar --layer bayesian_layer --mesh data=2,sequence=4 --out runs/a

Arrays are placed, and XLA's partitioner does the rest; filters alone say what devices send each
other (`layers.sharded`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from design_models import ModelError
from layers.memory import StreamMemory
from layers.mixer import SequenceMixer
from layers.sharded import DATA, HEADS, SEQUENCE, rule_refusal

from .layers_by_name import mixer_of
from .mesh_sizes import AXES, Sizes
from .plans import Plan

_OF_HEADS = {"weight": 2, "taps": 2, "bias": 1, "rate": 1, "parameter": 1, "out": 1}
"""Which axis of a mixer's array counts heads or their channels, behind the axis over runs."""


def make_mesh(sizes: Sizes) -> Mesh:
    """A mesh of the first devices; axes that are not named have one.

    Raises:
        ModelError: there are fewer devices, or some process of the run would have none of them.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    count, devices = int(np.prod(shape)), jax.devices()
    asked = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    if count > len(devices):
        raise ModelError(
            f"`--mesh` is {asked}, {count} devices; JAX has {len(devices)} here (on CPUs, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} makes more)."
        )
    if jax.process_count() > 1 and count < len(devices):
        raise ModelError(
            f"`--mesh` is {asked}, {count} devices; the processes of this run have "
            f"{len(devices)} together, and all must be used."
        )
    placed = np.asarray(devices[:count]).reshape(shape)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_plan(plan: Plan, sizes: Sizes) -> None:
    """Refuse a plan that a mesh does not divide.

    Raises:
        ModelError: a batch, the heads or a row's length is no multiple, or the layer's memory is
            not one whose time is split.
    """
    multiples = [("`--batch`", plan.course.batch, DATA), ("`--heads`", plan.heads, HEADS)]
    lengths = [("`--length`", segment.rows.length, SEQUENCE) for segment in plan.course.segments]
    for name, number, axis in multiples + lengths:
        if number % sizes.get(axis, 1):
            raise ModelError(f"{name} is {number}, no multiple of `--mesh` {axis}={sizes[axis]}.")
    if sizes.get(SEQUENCE, 1) == 1:
        return
    mixer = mixer_of(plan)(plan.d_model, jax.random.key(0))
    memory = mixer.memory if isinstance(mixer, SequenceMixer) else None
    if not isinstance(memory, StreamMemory) or rule_refusal(memory.rule) is not None:
        raise ModelError(
            f"`--mesh` splits time, and {plan.layer} is not a memory whose time can be split; "
            f"leave out {SEQUENCE}=."
        )


def in_use(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The context in which programs are split over a mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def placed(runs: Any, mesh: Mesh | None) -> Any:
    """Models and optimiser states on the mesh, heads split."""
    if mesh is None:
        return runs
    return _put(runs, _specs(runs, mesh.shape[HEADS]), mesh)


def kept_in_place(runs: Any) -> Any:
    """Inside a program: the same, where a mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return runs
    return _constrained(runs, _specs(runs, mesh.shape[HEADS]))


def everywhere(arrays: Any) -> Any:
    """Inside a program: arrays that every device holds whole, where a mesh is in use."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return _constrained(arrays, jax.tree.map(lambda leaf: PartitionSpec(), arrays))


def shown(asked: Any, mesh: Mesh | None) -> Any:
    """Batches on the mesh, a leading axis over steps: rows are split, and their positions too."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, asked)
    rows = PartitionSpec(None, DATA)
    specs = jax.tree.map(lambda leaf: rows, asked)
    specs = eqx.tree_at(lambda one: one.inputs, specs, PartitionSpec(None, DATA, SEQUENCE))
    return _put(asked, specs, mesh)


def gathered(runs: Any, mesh: Mesh | None) -> Any:
    """Models and optimiser states whole on one device of every process."""
    if mesh is None:
        return runs
    arrays, rest = eqx.partition(runs, eqx.is_array)
    with in_use(mesh):
        whole = jax.jit(everywhere)(arrays)
    return eqx.combine(jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), whole), rest)


def _specs(runs: Any, heads: int) -> Any:
    def spec(path, leaf):
        names = [getattr(key, "name", "") for key in path]
        axis = _OF_HEADS.get(names[-1]) if "mixer" in names else None
        if axis is None or leaf.ndim <= axis or leaf.shape[axis] % heads:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, HEADS)

    return jax.tree_util.tree_map_with_path(spec, eqx.filter(runs, eqx.is_array))


def _put(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Each process hands its devices their part of arrays that all processes have whole."""

    def put(leaf, spec):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, spec), lambda index: host[index]
        )

    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(put, arrays, specs), rest)


def _constrained(tree: Any, specs: Any) -> Any:
    arrays, rest = eqx.partition(tree, eqx.is_array)

    def constrain(leaf: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(leaf, spec)

    return eqx.combine(jax.tree.map(constrain, arrays, specs), rest)
