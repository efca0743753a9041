"""Example inputs for a design model: the defaults, and checks on a model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers

from .errors import ModelError

if TYPE_CHECKING:
    from .design_model import DesignModel

Draw = Callable[[PRNGKeyArray, int, int | None, int], Array]
"""(rng, steps, value width or None for a scalar value, key width) -> array."""


def _key(rng, steps, value_width, key_width):
    return jax.random.normal(rng, (steps, key_width)) / np.sqrt(key_width)


def _value(rng, steps, value_width, key_width):
    return jax.random.normal(rng, (steps,) if value_width is None else (steps, value_width))


def _uniform(low: float, high: float) -> Draw:
    return lambda rng, steps, value_width, key_width: jax.random.uniform(
        rng, (steps,), minval=low, maxval=high
    )


def _uniform_per_key(low: float, high: float) -> Draw:
    return lambda rng, steps, value_width, key_width: jax.random.uniform(
        rng, (steps, key_width), minval=low, maxval=high
    )


DEFAULTS: dict[str, tuple[Draw, ...]] = {
    "key": (_key,),
    "query": (_key,),
    "value": (_value,),
    "decay": (_uniform(0.7, 0.99), _uniform_per_key(0.7, 0.99)),
    "drift": (_uniform(0.05, 0.3), _uniform_per_key(0.05, 0.3)),
    "noise": (_uniform(0.1, 0.6),),
    "output_noise": (_uniform(0.1, 0.5),),
}
"""What is drawn for each name that a model reads from `u`: keys and queries Gaussian with mean
square norm 1 (not normalised), values standard normal; decay in [0.7, 0.99], drift variance in
[0.05, 0.3], noise variances in [0.1, 0.6], one scalar a step, or one number per key where a
scalar does not fit the model."""


class _MissingInput(KeyError):
    """A function read a name that `u` does not hold."""


class _RecordedInputs(dict):
    def __missing__(self, name: str) -> Any:
        raise _MissingInput(name)


def _memory_shape(model: DesignModel) -> Any:
    return jax.eval_shape(lambda: handlers.seed(model.prior, jax.random.key(0))())


def _run_once(model: DesignModel, memory: Any, u: dict[str, Array]) -> None:
    def step(memory, u):
        u = _RecordedInputs(u)
        with handlers.block(), handlers.seed(rng_seed=0):
            memory = model.transition(memory, u)
            model.observe(memory, u)
            if model.readout is not None:
                model.readout(memory, u)

    jax.eval_shape(step, memory, u)


def _widths(memory: Any) -> tuple[int | None, int]:
    """Value and key width of the memory's first array with two axes, else of its first array."""
    leaves = jax.tree.leaves(memory)
    matrix = next((leaf for leaf in leaves if leaf.ndim == 2), leaves[0] if leaves else None)
    if matrix is None or matrix.ndim not in (1, 2):
        shapes = [leaf.shape for leaf in leaves]
        raise ModelError(
            f"no default inputs for a memory of shapes {shapes}: defaults need an array (value, "
            "key); pass `inputs=` to DesignModel."
        )
    return (None if matrix.ndim == 1 else matrix.shape[0]), matrix.shape[-1]


def draw_default_inputs(model: DesignModel, rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
    """Draw `DEFAULTS` for the names that the model's functions read, query always included.

    Raises:
        ModelError: a name without a default is read, or the memory has no (value, key) array.
    """
    memory = _memory_shape(model)
    value_width, key_width = _widths(memory)
    names: dict[str, int] = {}

    def draws() -> dict[str, Array]:
        return draw_named(names, rng, steps, value_width, key_width)

    while True:
        try:
            _run_once(model, memory, {name: array[0] for name, array in draws().items()})
            break
        except _MissingInput as missing:
            (name,) = missing.args
            if name not in DEFAULTS:
                raise ModelError(
                    f'the model reads u["{name}"], which has no default '
                    f"(defaults: {', '.join(DEFAULTS)}); pass `inputs=` to DesignModel, a function "
                    "inputs(rng, steps) that returns a dict of arrays with a leading time axis."
                ) from None
            names[name] = 0
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            break  # Python needs a number; the proof says where
        except (TypeError, ValueError):
            wider = next((n for n, i in names.items() if i + 1 < len(DEFAULTS[n])), None)
            if wider is None:
                break  # no default fits; the proof says what does not
            names[wider] += 1
        except Exception:
            break  # the user's own; the proof says where
    if model.readout is None:
        names.setdefault("query", 0)
    return draws()


def draw_named(
    names: Mapping[str, int] | Sequence[str],
    rng: PRNGKeyArray,
    steps: int,
    value_width: int | None,
    key_width: int,
) -> dict[str, Array]:
    """Draw the defaults of some names; a mapping chooses among a name's shapes by number."""
    drawn = {}
    for index, (name, options) in enumerate(DEFAULTS.items()):
        if name in names:
            draw = options[names[name] if isinstance(names, Mapping) else 0]
            drawn[name] = draw(jax.random.fold_in(rng, index), steps, value_width, key_width)
    return drawn


def draw_own_inputs(model: DesignModel, rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
    """Call the model's `inputs` and check what it returns.

    Raises:
        ModelError: not a dict of finite arrays with a leading axis of `steps`.
    """
    if model.inputs is None:
        raise ModelError("the model has no `inputs`; use `draw_default_inputs`.")
    drawn = model.inputs(rng, steps)
    if not isinstance(drawn, dict) or not drawn:
        raise ModelError(
            f"`inputs(rng, steps)` returned {type(drawn).__name__}; "
            "it must return a dict of arrays with a leading time axis."
        )
    checked = {str(name): check_input(str(name), value, steps) for name, value in drawn.items()}
    if model.readout is None and "query" not in checked:
        memory = _memory_shape(model)
        if hasattr(memory, "ndim"):
            checked["query"] = _key(jax.random.fold_in(rng, 1), steps, *_widths(memory))
    return checked


def check_input(name: str, value: Any, steps: int | None) -> Array:
    """Return one input as a finite array whose leading axis is time.

    Raises:
        ModelError: not numeric, no leading axis of `steps`, or not finite.
    """
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ModelError(f'input "{name}" is not an array: {error}') from error
    if array.ndim == 0 or (steps is not None and array.shape[0] != steps):
        raise ModelError(
            f'input "{name}" has shape {array.shape}; its leading axis must be time'
            f"{'' if steps is None else f', {steps} steps'}."
        )
    if not bool(jnp.all(jnp.isfinite(array))):
        raise ModelError(
            f'input "{name}" holds NaN or infinite entries; filters need finite inputs.'
        )
    return array
