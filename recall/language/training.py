"""Training language models: rows shared among devices, one objective at a time, resumable."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from layers import LanguageModel
from recall.checkpoints.surgery import dials, restoration_of, with_dials
from recall.kept_run import KeptRun
from recall.text.corpus import Rows

_SECONDS_BETWEEN_SAVES = 120.0
_LONGEST_STEP = 1.0
"""Norm to which longer gradients are cut."""


class Goal(NamedTuple):
    """What an objective finds on some rows: sums, of which the quotient over all rows is told.

    Args:
        total: what is made small, summed.
        weight: that it is divided by.
        told: other sums and their weights, by name.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    told: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


Objective = Callable[[LanguageModel, Any, Array], Goal]
"""(model, what does not learn, marked rows) -> goal."""


class Training(eqx.Module):
    """A model and its optimiser's state."""

    model: LanguageModel
    optimiser: Any


@dataclass(frozen=True)
class Descent:
    """AdamW, a linear warm-up and a linear way down to a tenth.

    Args:
        rate: of weights, at the most.
        dial_rate: of numbers that only restored layers have, which are counted in logs.
        steps: in all.
        warmup: steps of it.
        weight_decay: of matrices; dials have none.
    """

    rate: float
    dial_rate: float
    steps: int
    warmup: int
    weight_decay: float = 0.0

    def scale(self, step: int) -> float:
        """What rates are multiplied by."""
        up = min(1.0, (step + 1) / max(1, self.warmup))
        left = 1 - max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return up * (0.1 + 0.9 * left)


def _transform() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(_LONGEST_STEP), optax.scale_by_adam(b1=0.9, b2=0.95)
    )


def started(model: LanguageModel) -> Training:
    """A model that no step has been made with."""
    # Copies: steps give their arguments' memory away, and a teacher keeps its own.
    model = jax.tree.map(lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, model)
    return Training(model, _transform().init(eqx.filter(model, eqx.is_inexact_array)))


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:devices]), ("data",))


def make_step(
    objective: Objective, descent: Descent, like: Training, frozen: Any, mesh: Mesh
) -> Callable[[Training, Rows, int], tuple[Training, dict[str, Array]]]:
    """A step over rows that the mesh's devices share; gradients are of the mean over all rows.

    Args:
        objective: of the model's rows.
        descent: rates.
        like: what will be trained.
        frozen: what the objective reads besides, which does not learn.
        mesh: of devices, along "data".

    Returns:
        Maps (training, rows, number of the step) to the training after it, and what is told:
        "loss" and the objective's own. The training that is given is used up.
    """
    transform = _transform()
    static = eqx.filter(like, eqx.is_array, inverse=True)
    dialled, decays = _dialled(like.model, descent.weight_decay)
    all_rows, everywhere = PartitionSpec("data"), PartitionSpec()
    here, shared_rows = NamedSharding(mesh, everywhere), NamedSharding(mesh, all_rows)
    frozen_arrays, frozen_static = eqx.partition(frozen, eqx.is_array)
    frozen_arrays = jax.device_put(frozen_arrays, here)

    def of_rows(arrays, frozen_arrays, rows):
        model = eqx.combine(arrays, static).model
        frozen = eqx.combine(frozen_arrays, frozen_static)

        def total(model):
            goal = objective(model, frozen, rows)
            return goal.total, goal

        (_, goal), slopes = eqx.filter_value_and_grad(total, has_aux=True)(model)
        return jax.lax.psum((goal, slopes), "data")

    shared = jax.shard_map(
        of_rows,
        mesh=mesh,
        in_specs=(everywhere, everywhere, all_rows),
        out_specs=everywhere,
        check_vma=False,
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=here)
    def step(arrays, frozen_arrays, rows, rates):
        goal, slopes = shared(arrays, frozen_arrays, rows)
        training = eqx.combine(arrays, static)
        weight = jnp.maximum(goal.weight, 1e-9)
        slopes = jax.tree.map(lambda slope: slope / weight, slopes)
        parameters = eqx.filter(training.model, eqx.is_inexact_array)
        moves, optimiser = transform.update(slopes, training.optimiser, parameters)
        moves = jax.tree.map(
            lambda move, own, dial, decay: -rates[int(dial)] * (move + decay * own),
            moves,
            parameters,
            dialled,
            decays,
        )
        after = Training(eqx.apply_updates(training.model, moves), optimiser)
        told = {name: total / jnp.maximum(all_, 1e-9) for name, (total, all_) in goal.told.items()}
        return eqx.filter(after, eqx.is_array), {"loss": goal.total / weight, **told}

    def take(training: Training, rows: Rows, number: int) -> tuple[Training, dict[str, Array]]:
        # Where arrays lie is settled before the first step: the second is then no other program.
        arrays = jax.device_put(eqx.filter(training, eqx.is_array), here)
        rates = np.asarray([descent.rate, descent.dial_rate], np.float32) * descent.scale(number)
        arrays, told = step(
            arrays,
            frozen_arrays,
            jax.device_put(rows, shared_rows),
            jax.device_put(rates, here),
        )
        return eqx.combine(arrays, static), told

    return take


def _dialled(model: LanguageModel, weight_decay: float) -> tuple[Any, Any]:
    """Whether each parameter is a dial, and its weight decay."""
    parameters = eqx.filter(model, eqx.is_inexact_array)
    dialled = jax.tree.map(lambda _: False, parameters)
    decays = jax.tree.map(lambda leaf: weight_decay if leaf.ndim > 1 else 0.0, parameters)
    for number, block in enumerate(model.blocks):
        if restoration_of(block.mixer) is None:
            continue
        dialled, decays = (
            eqx.tree_at(
                lambda model, at=number: model.blocks[at].mixer,
                tree,
                with_dials(tree.blocks[number].mixer, dict.fromkeys(dials(block.mixer), value)),
            )
            for tree, value in ((dialled, True), (decays, 0.0))
        )
    return dialled, decays


History = dict[str, Any]
"""`told`: by name, one number a step; `seconds` and `compiling`: of each piece of training."""


@dataclass(frozen=True)
class Run:
    """Training on disk.

    Args:
        files: of the run.
        steps: in all.
        tokens: read in a step.
        devices: that share them.
        show: told (step, steps, words) after each step.
        deadline: `time.perf_counter()` at which training stops with a checkpoint.
    """

    files: KeptRun
    steps: int
    tokens: int
    devices: int
    show: Callable[[int, int, str], None] = lambda step, steps, words: None
    deadline: float = math.inf


def train(
    run: Run,
    training: Training,
    step_of: Callable[[int], Callable[[Training, Rows, int], tuple[Training, dict[str, Array]]]],
    batch: Callable[[int], Rows],
) -> tuple[Training, History, bool]:
    """Train to the end or the deadline, from the last checkpoint on.

    Args:
        run: where, and how far.
        training: to begin with.
        step_of: which of `make_step` takes a step, by the step's number.
        batch: rows of a step.

    Returns:
        The training, what was told of it, and whether it is at its end.
    """
    training, first, before = run.files.load(training)
    history: History = {"told": {}, "seconds": [], "compiling": []} | before
    if first >= run.steps:
        return training, history, True
    history["seconds"].append(0.0)
    history["compiling"].append(0.0)
    began = saved = time.perf_counter()
    compiling, warm = 0.0, set()
    waiting: tuple[int, dict[str, Array]] | None = None
    for number in range(first, run.steps):
        take, started_at = step_of(number), time.perf_counter()
        if id(take) not in warm and waiting is not None:
            _tell(run, history, *waiting, (number - first) * run.tokens, began + compiling)
            waiting = None
        training, told = take(training, batch(number), number)
        if id(take) not in warm:
            warm.add(id(take))
            jax.block_until_ready(told)
            compiling += time.perf_counter() - started_at
        if waiting is not None:
            _tell(run, history, *waiting, (number - first) * run.tokens, began + compiling)
        waiting = number, told
        now, last = time.perf_counter(), number + 1 == run.steps
        late = now > run.deadline
        if last or late or now - saved > _SECONDS_BETWEEN_SAVES:
            _tell(run, history, *waiting, (number + 1 - first) * run.tokens, began + compiling)
            waiting = None
            history["seconds"][-1] = time.perf_counter() - began - compiling
            history["compiling"][-1] = compiling
            run.files.save(training, number + 1, history)
            saved = time.perf_counter()
            if late and not last:
                return training, history, False
    return training, history, True


def _tell(
    run: Run, history: History, number: int, told: Mapping[str, Array], tokens: int, began: float
) -> None:
    found = {name: float(value) for name, value in told.items()}
    for name, value in found.items():
        history["told"].setdefault(name, []).append([number, value])
    speed = tokens / max(time.perf_counter() - began, 1e-9)
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
    run.show(number, run.steps, f"{numbers}  {speed:,.0f} tokens/s")


def spent(run: Run, history: History) -> dict[str, float]:
    """Seconds of training without compiling, device by device, and tokens a second."""
    seconds = sum(history["seconds"])
    return {
        "seconds": seconds,
        "device_seconds": seconds * run.devices,
        "compiling_seconds": sum(history["compiling"]),
        "tokens": run.steps * run.tokens,
        "tokens_per_second": run.steps * run.tokens / max(seconds, 1e-9),
    }


def lately(history: History, name: str, steps: int = 50) -> float:
    """Mean of what was last told."""
    return float(np.mean([value for _, value in history["told"][name][-steps:]]))
