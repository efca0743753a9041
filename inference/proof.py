r"""The proof that a design model is linear-Gaussian.

Each function is run with symbolic memory and symbolic site values, and the log density of every
site is shown to be a polynomial of degree at most 2 in all of them together (`inference.degree`).
On unbounded real support that is what linear-Gaussian means: a conditional density
$\log p(x \mid s)$ that is jointly quadratic has a constant Hessian in x, so its covariance is
constant and its mean is affine in s. What a function returns must be affine, and what it observes
must not depend on the memory. The proof holds for every value of the inputs, which stay symbolic.

It does not cover: that log densities are normalised and that automatic differentiation is honest
(checked by plain evaluation in `inference.evaluation`), Python state that changes between calls,
and rounding.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from design_models import DesignModel, ModelError

from . import locations
from .degree import Degree, degrees
from .errors import NotLinearGaussian, NotSupported
from .tracing import innermost, run_with_values

_AFFINE, _QUADRATIC = 1, 2
_NEEDS_LATENT = (
    "Python needs the value of a latent (an `if`, float() or NumPy call on the memory or a draw)"
)


@dataclass(frozen=True)
class ProvedSite:
    """A site of a proved function."""

    name: str
    shape: tuple[int, ...]
    observed: bool
    family: str
    location: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ProvedFunction:
    """A function whose sites are jointly Gaussian given the memory, and whose result is affine."""

    name: str
    call: Callable[..., Any]
    takes_memory: bool
    sites: tuple[ProvedSite, ...]
    names: tuple[tuple[str, str], ...]  # of all sites, fixed ones too, with their locations
    result: Any  # shapes of what it returns

    @property
    def observed(self) -> tuple[ProvedSite, ...]:
        return tuple(site for site in self.sites if site.observed)


@dataclass(frozen=True)
class Proof:
    """The four functions of a design model, proved linear-Gaussian."""

    prior: ProvedFunction
    transition: ProvedFunction
    observe: ProvedFunction
    readout: ProvedFunction
    memory: Any  # a pytree of jax.ShapeDtypeStruct


def prove(model: DesignModel, u: Mapping[str, Array]) -> Proof:
    """Prove that `model` is linear-Gaussian for every value of inputs shaped like `u`.

    Args:
        model: the design model.
        u: one step's inputs; only shapes and types matter.

    Raises:
        NotLinearGaussian: with function, site, reason, file and line.
        NotSupported: outside what can be proved here.
        ModelError: a function reads an input that `u` does not hold.
    """
    prior = prove_prior(model)
    memory = prior.result
    transition = _prove_function("transition", model.transition, memory, u)
    _check_returned_memory(transition, memory, _definition(model.transition))
    observe = _prove_function("observe", _observing(model), memory, u, model.observe)
    readout = _prove_function("readout", model.read, memory, u, model.readout or model.read)
    if not jax.tree.leaves(readout.result):
        reason = f"returns {readout.result}; return the output, one or more arrays"
        raise NotSupported("readout", "", reason, _definition(model.readout or model.read))
    _check_names(transition, observe, readout)
    if prior.observed or readout.observed:
        where = prior if prior.observed else readout
        raise NotSupported(
            where.name,
            where.observed[0].name,
            "is observed; observations belong in `observe` or `transition`",
            where.observed[0].location,
        )
    if not transition.observed and not observe.observed:
        raise NotSupported(
            "observe",
            "",
            "holds no sample site with obs=; nothing is ever written",
            _definition(model.observe),
        )
    return Proof(prior, transition, observe, readout, memory)


def prove_prior(model: DesignModel) -> ProvedFunction:
    """Prove the prior alone, which needs no inputs.

    Raises:
        NotLinearGaussian: as `prove`.
    """
    prior = _prove_function("prior", lambda memory, u: model.prior(), None, {}, model.prior)
    _check_memory(prior.result, _definition(model.prior))
    # A memory that is narrower at first is not so later, and then rounding it is no identity.
    memory = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, float), prior.result)
    return replace(prior, result=memory)


def _observing(model: DesignModel) -> Callable[..., None]:
    """`observe` without what it returns, which a sequence ignores."""

    def observe(memory: Any, u: Mapping[str, Array]) -> None:
        model.observe(memory, u)

    return observe


def _definition(function: Callable[..., Any]) -> str:
    return locations.of_definition(inspect.unwrap(function))


def _check_memory(memory: Any, location: str) -> None:
    leaves = jax.tree.leaves(memory)
    if not leaves or any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        found = memory if not leaves else [leaf.dtype.name for leaf in leaves]
        reason = f"returns {found}; it must return the memory, arrays of real numbers"
        raise NotSupported("prior", "", reason, location)
    if not any(leaf.size for leaf in leaves):
        reason = f"returns a memory of shape {[leaf.shape for leaf in leaves]}, with no entries"
        raise NotSupported("prior", "", reason, location)


def _check_returned_memory(transition: ProvedFunction, memory: Any, location: str) -> None:
    same_tree = jax.tree.structure(transition.result) == jax.tree.structure(memory)
    before = [leaf.shape for leaf in jax.tree.leaves(memory)]
    after = [leaf.shape for leaf in jax.tree.leaves(transition.result)]
    if not same_tree or before != after:
        raise NotSupported(
            "transition",
            "",
            f"returns {after if after else transition.result}, but the memory is {before}; "
            "return the next memory, shaped like the last",
            location,
        )
    types = [leaf.dtype for leaf in jax.tree.leaves(transition.result)]
    if any(not jnp.issubdtype(dtype, jnp.floating) for dtype in types):
        found = [dtype.name for dtype in types]
        reason = f"returns {found}; it must return the next memory, arrays of real numbers"
        raise NotSupported("transition", "", reason, location)


def _check_names(*functions: ProvedFunction) -> None:
    owners: dict[str, str] = {}
    for function in functions:
        for name, location in function.names:
            if name in owners:
                raise NotSupported(
                    function.name,
                    name,
                    f"shares its name with a site of `{owners[name]}`, in the same step",
                    location,
                )
            owners[name] = function.name


def _prove_function(
    name: str,
    call: Callable[..., Any],
    memory: Any,
    u: Mapping[str, Array],
    source: Callable[..., Any] | None = None,
) -> ProvedFunction:
    source = call if source is None else source
    whole = _definition(source)
    found: dict[str, ProvedSite] = {}
    places: dict[str, str] = {}
    names: dict[str, str] = {}

    def declare(memory: Any, u: Mapping[str, Array]) -> Any:
        returned, sites = run_with_values(name, call, (memory, u), {}, names)
        for site in sites.values():
            if not site.deterministic:
                found[site.name] = ProvedSite(
                    site.name,
                    jnp.shape(site.value),
                    site.observed,
                    type(innermost(site.distribution)).__name__,
                    site.location,
                )
        return returned

    result = _explain_python_control(name, declare, memory, u)
    sites = tuple(found.values())
    values = {site.name: jax.ShapeDtypeStruct(site.shape, float) for site in sites}

    def densities(latents: tuple[Any, dict[str, Array]], u: Mapping[str, Array]) -> Any:
        returned, met = run_with_values(name, call, (latents[0], u), latents[1])
        density, fixed, hidden, observation = {}, {}, {}, {}
        returned = jax.tree.map(jnp.asarray, returned)
        _refuse_complex(name, "", "what it returns", jax.tree.leaves(returned), whole)
        for site in met.values():
            base = innermost(site.distribution)
            places[site.name] = site.location
            if site.deterministic:
                fixed[site.name] = jnp.asarray(base.v)
                hidden[site.name] = jnp.asarray(base.log_density)
            else:
                density[site.name] = jnp.sum(site.distribution.log_prob(site.value))
                _refuse_complex(
                    name, site.name, "its log density", [density[site.name]], site.location
                )
            if site.observed:
                seen = observation[site.name] = jnp.asarray(site.observation)
                _refuse_complex(name, site.name, "its observed value", [seen], site.location)
        return density, fixed, hidden, observation, returned

    proved = _explain_python_control(
        name, lambda memory, u: degrees(densities, (memory, values), u), memory, u, traced=False
    )
    density, fixed, hidden, observation, returned = proved
    if set(density) != set(values):
        raise NotSupported(name, "", "its sample sites change from call to call", whole)
    for site in sites:
        if density[site.name].degree > _QUADRATIC:
            _refuse_density(name, call, site, memory, values, u, density[site.name])
    for site_name, degree in fixed.items():
        reason = "its fixed value is not affine in the memory"
        _refuse_above(name, site_name, degree, _AFFINE, reason, places[site_name])
    for site_name, degree in hidden.items():
        reason = "its log_density re-weights the memory"
        _refuse_above(name, site_name, degree, 0, reason, places[site_name])
    for site_name, degree in observation.items():
        reason = "its observed value depends on the memory"
        _refuse_above(name, site_name, degree, 0, reason, places[site_name])
    for degree in jax.tree.leaves(returned, is_leaf=lambda leaf: isinstance(leaf, Degree)):
        reason = "what it returns is not affine in the memory"
        _refuse_above(name, "", degree, _AFFINE, reason, whole)
    takes_memory = memory is not None
    return ProvedFunction(name, call, takes_memory, sites, tuple(names.items()), result)


def _refuse_above(
    function: str, site: str, degree: Degree, most: int, reason: str, location: str
) -> None:
    if degree.degree > most:
        detail = f": {degree.reason}" if degree.reason else ""
        raise NotLinearGaussian(function, site, reason + detail, degree.location or location)


def _refuse_complex(
    function: str, site: str, what: str, arrays: list[Array], location: str
) -> None:
    if any(jnp.iscomplexobj(array) for array in arrays):
        reason = f"{what} is complex; a memory and what is observed of it are real numbers"
        raise NotSupported(function, site, reason, location)


def _refuse_density(
    function: str,
    call: Callable[..., Any],
    site: ProvedSite,
    memory: Any,
    values: Mapping[str, Any],
    u: Mapping[str, Array],
    degree: Degree,
) -> None:
    """Say in the user's terms why a site's log density is not quadratic."""

    def parameters(latents: tuple[Any, dict[str, Array]], u: Mapping[str, Array]) -> Any:
        _, met = run_with_values(function, call, (latents[0], u), latents[1])
        base = innermost(met[site.name].distribution)
        own = {key: base.__dict__.get(key) for key in base.arg_constraints}
        return {key: jnp.asarray(value) for key, value in own.items() if value is not None}

    try:
        found = degrees(parameters, (memory, values), u)
    except (TypeError, ValueError):
        found = {}
    for parameter, law in found.items():
        detail = f": {law.reason}" if law.reason else ""
        location = law.location or site.location
        if parameter == "loc" and law.degree > _AFFINE:
            detail = detail or ": it multiplies two latent quantities"
            reason = f"its mean is not affine in the memory{detail}"
            raise NotLinearGaussian(function, site.name, reason, location)
        if parameter != "loc" and law.degree > 0:
            reason = f"its {parameter} depends on the memory or another latent{detail}"
            raise NotLinearGaussian(function, site.name, reason, location)
    detail = f": {degree.reason}" if degree.reason else ""
    raise NotLinearGaussian(
        function,
        site.name,
        f"its log density is not quadratic, so {site.family} is not Gaussian here{detail}",
        site.location or degree.location,
    )


def _explain_python_control(
    function: str, run: Callable[..., Any], memory: Any, u: Mapping[str, Array], traced: bool = True
) -> Any:
    """Run symbolically; where Python needs a number, say whether of the memory or of an input."""
    try:
        return jax.eval_shape(run, memory, dict(u)) if traced else run(memory, dict(u))
    except (NotLinearGaussian, ModelError):
        raise
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        location = locations.of_error(error)
        # A batch of memories is symbolic where the inputs are numbers, and the other way about.
        batch = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape), float), memory)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float), memory)
        inputs = {name: jnp.stack([array, array]) for name, array in u.items()}
        of_memory = _needs_numbers(
            lambda: jax.vmap(lambda memory: run(memory, dict(u)), axis_size=2)(batch)
        )
        of_inputs = bool(inputs) and _needs_numbers(
            lambda: jax.vmap(lambda u: run(zeros, u))(inputs)
        )
        if of_memory or not of_inputs:  # of neither: of a latent draw
            raise NotLinearGaussian(function, "", _NEEDS_LATENT, location) from error
        raise NotSupported(
            function,
            "",
            "Python needs the value of an input (an `if`, float() or NumPy call on `u`); "
            "use jnp.where and jax.numpy",
            location,
        ) from error
    except KeyError as error:
        held = ", ".join(u) or "nothing"
        raise ModelError(
            f"`{function}` reads u[{error}], but the inputs hold {held}; add it to `inputs` "
            f"({locations.of_error(error)})."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"`{function}` raised {type(error).__name__}: {reason} ({locations.of_error(error)})."
        ) from error


def _needs_numbers(run: Callable[[], Any]) -> bool:
    """Whether Python needs the value of something symbolic, before anything else goes wrong."""
    try:
        run()
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return True
    except Exception:  # of numbers: Python got beyond the place that needed one
        return False
    return False
