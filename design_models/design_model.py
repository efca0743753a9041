"""A design model: what a sequence layer's memory is assumed to do, as NumPyro functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers

from .errors import ModelError
from .example_inputs import draw_default_inputs, draw_own_inputs

Inputs = Mapping[str, Array]
"""One step's inputs, or a sequence's, in which case every array has a leading time axis."""


@dataclass(frozen=True)
class DesignModel:
    r"""What a memory is assumed to do, one step at a time.

    $$ S_0 \sim \text{prior},\quad S_t \sim \text{transition}(S_{t-1}, u_t),\quad
       v_t \sim \text{observe}(S_t, u_t),\quad y_t \sim \text{readout}(S_t, u_t) $$

    Args:
        prior: `prior() -> memory`, any pytree of arrays; usually one array (value, key).
        transition: `transition(memory, u) -> memory`; it may hold observed sites (evidence about
            the change rather than about the memory).
        observe: `observe(memory, u)`, one or more `numpyro.sample(..., obs=...)`.
        readout: `readout(memory, u)`, the layer's output: a sample site, or the value returned.
            Left out, `memory @ u["query"]`.
        inputs: `inputs(rng, steps) -> dict` draws example inputs with a leading time axis.
            Observed values in it are placeholders. Left out, the names that the functions read
            are drawn from the defaults of `design_models.example_inputs`.

    Raises:
        ModelError: an argument is not callable.
    """

    prior: Callable[[], Any]
    transition: Callable[[Any, Inputs], Any]
    observe: Callable[[Any, Inputs], Any]
    readout: Callable[[Any, Inputs], Any] | None = None
    inputs: Callable[[PRNGKeyArray, int], Inputs] | None = None

    def __post_init__(self) -> None:
        for name in ("prior", "transition", "observe", "readout", "inputs"):
            function = getattr(self, name)
            optional = name in ("readout", "inputs")
            if not callable(function) and not (optional and function is None):
                raise ModelError(
                    f"`{name}` of a DesignModel is {function!r}; it must be a function"
                    f"{' or left out' if optional else ''}."
                )

    def read(self, memory: Any, u: Inputs) -> Any:
        """Read the memory: what `readout` returns, else the values of its sites.

        Without a `readout`, `memory @ u["query"]`.

        Raises:
            ModelError: `readout` returns nothing and samples nothing; or there is none, and the
                memory is not one array, or `u` holds no query.
        """
        if self.readout is not None:
            with handlers.trace() as met:
                returned = self.readout(memory, u)
            sites = [site["value"] for site in met.values() if site["type"] == "sample"]
            if returned is None and not sites:
                raise ModelError(
                    "`readout` returns nothing and samples nothing; return the output."
                )
            return sites if returned is None else returned
        if not hasattr(memory, "ndim"):
            raise ModelError(
                f"the memory is a {type(memory).__name__}, so `memory @ query` means nothing; "
                "pass `readout=` to DesignModel."
            )
        if "query" not in u:
            raise ModelError('the inputs hold no "query" to read with; add one or pass `readout=`.')
        return memory @ u["query"]

    def draw_inputs(self, rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        """Draw example inputs for `steps` steps, each array with a leading time axis.

        Raises:
            ModelError: the functions read a name that has no default, or `inputs` returned
                something else than finite arrays with a leading axis of `steps`.
        """
        if self.inputs is None:
            return draw_default_inputs(self, rng, steps)
        return draw_own_inputs(self, rng, steps)

    def sequence(self, inputs: Inputs) -> Callable[[], tuple[list[Any], Any]]:
        """Return the whole sequence as one NumPyro model, to inspect, condition, render or sample.

        Sites are named `prior/NAME`, `step_1/NAME`, ...; the last step is also read. The model
        returns the memory after each step, and the output of the last.

        Args:
            inputs: arrays with a leading time axis of at least one step.
        """
        steps = len(jax.tree.leaves(inputs)[0])

        def model() -> tuple[list[Any], Any]:
            with handlers.scope(prefix="prior"):
                memory = self.prior()
            memories = []
            u: Inputs = {}
            for t in range(steps):
                u = {name: array[t] for name, array in inputs.items()}
                with handlers.scope(prefix=f"step_{t + 1}"):
                    memory = self.transition(memory, u)
                    self.observe(memory, u)
                memories.append(memory)
            with handlers.scope(prefix=f"step_{steps}"):
                output = self.read(memory, u)
            return memories, output

        return model
