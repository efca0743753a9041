"""A whole NumPyro model that loops with `numpyro.contrib.control_flow.scan`, as a design model."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions.distribution import validation_enabled
from numpyro.primitives import Messenger

from .design_model import DesignModel
from .errors import ModelError
from .example_inputs import DEFAULTS, draw_named

_VALUE_WIDTH, _KEY_WIDTH, _STEPS = 3, 2, 3


class _Reached(Exception):
    """The model reached its scan; carries the body, the first memory and the inputs."""


class _StopAtScan(Messenger):
    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "control_flow":
            return
        body, memory, inputs, _, reverse = msg["args"]
        if reverse or msg["kwargs"].get("history", 1) != 1:
            raise ModelError("the model's scan runs in reverse or with history; write it forwards.")
        raise _Reached(body, memory, inputs)


class _SplitStep(Messenger):
    """Give the site that becomes the memory a chosen value, or hide what is observed."""

    def __init__(self, memory_site: str | None = None, memory: Any = None, hide: bool = False):
        self.memory_site, self.memory, self.hide = memory_site, memory, hide
        self.sites: dict[str, Any] = {}
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        if msg["name"] == self.memory_site:
            msg["value"], msg["type"], msg["stop"] = self.memory, "deterministic", True
        elif self.hide and msg["is_observed"]:
            msg["type"], msg["stop"] = "deterministic", True  # the other half holds the site

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            self.sites[msg["name"]] = msg["value"]


def from_scan(
    model: Callable[..., Any],
    inputs: Callable[[PRNGKeyArray, int], Mapping[str, Array]] | None = None,
) -> DesignModel:
    """Return the design model of a whole NumPyro model.

    The model samples a first memory, then calls `scan(step, memory, inputs)` once, where
    `step(memory, u)` samples the next memory, observes, and returns `(memory, None)`. It takes
    the inputs either as one dict or by name:

        def model(inputs):
            memory = numpyro.sample("start", ...)
            scan(step, memory, inputs)

    The read-out is `memory @ query`. A step whose memory is one of its sample sites is split into
    transition and observation; otherwise what it observes counts as observed in the transition.

    Args:
        model: the whole model.
        inputs: `inputs(rng, steps) -> dict`; the documented defaults where left out.

    Raises:
        ModelError: there is no scan, or more happens after it; or the inputs do not fit.
    """
    names = _parameters(model)

    def draw(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        if inputs is not None:
            return dict(inputs(rng, steps))
        wanted = [n for n in (names or DEFAULTS) if n in DEFAULTS]
        return draw_named(wanted, rng, steps, _VALUE_WIDTH, _KEY_WIDTH)

    example = draw(jax.random.key(0), _STEPS)

    def prior() -> Any:
        try:
            with _StopAtScan():
                _call(model, names, example)
        except _Reached as reached:
            return reached.args[1]
        raise ModelError("the model calls no `numpyro.contrib.control_flow.scan`.")

    try:
        body, memory, scanned, before = _reach(model, names, example)
    except ModelError:
        raise
    except Exception as error:
        return _failing(prior, lambda memory, u: memory, draw, error)

    def sequence_inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        drawn = draw(rng, steps)
        named = _named(_reach(model, names, drawn)[2])
        return {**named, **({"query": drawn["query"]} if "query" in drawn else {})}

    def step(memory: Any, u: Mapping[str, Array]) -> Any:
        carried, _ = body(memory, _unnamed(scanned, u))
        return carried

    try:
        _refuse_afterwards(model, names, example, before)
    except ModelError:
        raise
    except Exception as error:
        return _failing(prior, step, sequence_inputs, error)
    site = _memory_site(step, memory, sequence_inputs)
    if site is None:
        return DesignModel(prior, step, lambda memory, u: None, inputs=sequence_inputs)

    def transition(memory: Any, u: Mapping[str, Array]) -> Any:
        with _SplitStep(hide=True):
            return step(memory, u)

    def observe(memory: Any, u: Mapping[str, Array]) -> None:
        # What is observed must not depend on the past, at any input: nothing would be known of it.
        past = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), memory)
        with validation_enabled(False), _SplitStep(memory_site=site, memory=memory):
            step(past, u)

    return DesignModel(prior, transition, observe, inputs=sequence_inputs)


def _failing(prior: Callable, step: Callable, inputs: Callable, error: Exception) -> DesignModel:
    """A model that raised `error` when run on numbers: whoever derives it says what it is."""

    def transition(memory: Any, u: Mapping[str, Array]) -> Any:
        step(memory, u)
        raise error

    return DesignModel(prior, transition, lambda memory, u: None, inputs=inputs)


def _parameters(model: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the inputs that the model takes one by one; empty where it takes one dict."""
    parameters = [
        name
        for name, parameter in inspect.signature(model).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    if len(parameters) == 1 and parameters[0] not in DEFAULTS:
        return ()
    return tuple(parameters)


def _call(model: Callable[..., Any], names: tuple[str, ...], inputs: Mapping[str, Array]) -> Any:
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ModelError(f"the model takes {missing}, which have no default; pass `inputs=`.")
    with validation_enabled(False):  # parameters are checked when the model is derived
        return model(**{name: inputs[name] for name in names}) if names else model(dict(inputs))


def _reach(model, names, inputs) -> tuple[Callable, Any, Any, set[str]]:
    """Run the model up to its scan: body, first memory, inputs, and the names met before it."""
    met = handlers.trace()
    try:
        with met, handlers.seed(rng_seed=0), _StopAtScan():
            _call(model, names, inputs)
    except _Reached as reached:
        body, memory, scanned = reached.args
        return body, memory, scanned, set(met.trace)
    raise ModelError("the model calls no `numpyro.contrib.control_flow.scan`.")


def _refuse_afterwards(model, names, inputs, before: set[str]) -> None:
    """Refuse a model that samples after its scan, where nothing of it would be verified."""
    met: list[str] = []

    class Watch(Messenger):
        scans = 0

        def process_message(self, msg: dict[str, Any]) -> None:
            if msg["type"] == "control_flow":
                self.scans += 1
                body, memory, scanned, *_ = msg["args"]
                first = jax.tree.map(lambda array: array[0], scanned)
                with handlers.block(), handlers.seed(rng_seed=0):
                    carried, out = body(memory, first)
                msg["value"] = (
                    (jnp.asarray(1), jax.random.key(0), carried),
                    (_Traced({}), jax.tree.map(lambda leaf: leaf[None], out)),
                )
            elif msg["type"] == "sample":
                met.append(msg["name"])

    watch = Watch()
    with handlers.seed(rng_seed=0), watch:
        _call(model, names, inputs)
    extra = [name for name in met if name not in before]
    if watch.scans > 1 or extra:
        found = f"site '{extra[0]}'" if extra else "another scan"
        raise ModelError(
            f"the model holds {found} after its scan; a read-out belongs in "
            "DesignModel(readout=...), and one scan is followed."
        )


class _Traced:
    def __init__(self, trace: dict[str, Any]) -> None:
        self.trace = trace


def _named(scanned: Any) -> dict[str, Array]:
    """The scanned inputs as a flat dict of arrays."""
    if isinstance(scanned, dict) and all(hasattr(v, "ndim") for v in scanned.values()):
        return {str(name): array for name, array in scanned.items()}
    return {f"input{i}": array for i, array in enumerate(jax.tree.leaves(scanned))}


def _unnamed(scanned: Any, u: Mapping[str, Array]) -> Any:
    """One step's inputs as the body of the scan takes them."""
    if isinstance(scanned, dict) and all(hasattr(v, "ndim") for v in scanned.values()):
        return {name: u[name] for name in scanned}
    tree = jax.tree.structure(scanned)
    return jax.tree.unflatten(tree, [u[f"input{i}"] for i in range(tree.num_leaves)])


def _memory_site(step: Callable, memory: Any, inputs: Callable) -> str | None:
    """The sample site that the step returns as the memory, if nothing else of it is observed."""
    u = {name: array[0] for name, array in inputs(jax.random.key(0), 1).items()}

    def carried_site(memory: Any) -> str | None:
        split = _SplitStep()
        with validation_enabled(False), handlers.block(), handlers.seed(rng_seed=0), split:
            carried = step(memory, u)
        return next((name for name, value in split.sites.items() if value is carried), None)

    site = carried_site(memory)
    if site is None:
        return None

    def observed(previous: Any, seed: int) -> list[Array]:
        given = _SplitStep(memory_site=site, memory=jnp.ones_like(memory))
        seeded = handlers.seed(rng_seed=seed)
        with validation_enabled(False), handlers.block(), seeded, handlers.trace() as met, given:
            step(previous, u)
        return [
            site["fn"].log_prob(jnp.ones_like(site["value"]))
            for site in met.values()
            if site["type"] == "sample" and site["is_observed"]
        ]

    # The observation may depend on nothing but the new memory: compare two different pasts.
    try:
        first = observed(jax.tree.map(jnp.zeros_like, memory), 0)
        second = observed(jax.tree.map(lambda leaf: 2.0 + jnp.zeros_like(leaf), memory), 1)
    except (TypeError, ValueError):
        return None  # a density that cannot be evaluated is refused when the model is derived
    alike = all(
        bool(jnp.allclose(a, b, equal_nan=True)) for a, b in zip(first, second, strict=True)
    )
    return site if first and alike else None
