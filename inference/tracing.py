"""Run one function of a design model with chosen site values, and see what it did.

Everything that is said about a model rests on three views of the same run:

- `run_with_values`: every site takes a given value; its log density is read. This is the view of
  the proof (symbolic values) and of the evaluation check (random values).
- `run_with_draws`: every site takes its own mean plus its own noise, driven by given standard
  normal draws, so that the function becomes a map (memory, draws) -> (result, observations).
- `declared_sites`: the sites in order, with shape, location and kind.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.distribution import validation_enabled
from numpyro.primitives import Messenger

from design_models import ModelError

from . import locations
from .errors import NotLinearGaussian, NotSupported

LARGEST_DENSE_SITE = 1024
"""Largest site, in entries, whose covariance may be a dense matrix."""
EARLIER_CALL = (
    "reads what an earlier call left in Python (a list, a global); a step depends on its "
    "arguments alone"
)


@dataclass(frozen=True)
class Site:
    """A sample site as it was met in one run."""

    name: str
    distribution: dist.Distribution
    value: Array
    observation: Any  # the value passed as obs=, or None for a latent site
    location: str

    @property
    def observed(self) -> bool:
        return self.observation is not None

    @property
    def deterministic(self) -> bool:
        return is_delta(self.distribution)


def innermost(distribution: Any) -> Any:
    """Strip `to_event`, `expand` and masks, but no subclass of theirs: it may hide a density."""
    while type(distribution) in (
        dist.Independent,
        dist.ExpandedDistribution,
        dist.MaskedDistribution,
    ):
        distribution = distribution.base_dist
    return distribution


def is_delta(distribution: dist.Distribution) -> bool:
    """Whether a site's value is given, not drawn; a subclass of Delta may hide a density."""
    return type(innermost(distribution)) is dist.Delta


def _masked(distribution: dist.Distribution) -> bool:
    while True:
        if isinstance(distribution, dist.MaskedDistribution):
            return True
        if not isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
            return False
        distribution = distribution.base_dist


def _real_support(distribution: dist.Distribution) -> bool:
    support = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return type(support) in {
        type(constraints.real),
        type(constraints.real_vector),
        type(constraints.real_matrix),
    }


class _Watch(Messenger):
    """Refuse what has no Kalman form, give sites the values asked for, and record them."""

    def __init__(self, function: str, value_of: Callable[[str, Any], Array | None]) -> None:
        self.function = function
        self.value_of = value_of
        self.sites: dict[str, Site] = {}
        self.names: dict[str, str] = {}
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        kind, name = msg["type"], str(msg.get("name") or "")
        if kind in ("deterministic", "sample"):
            if name in self.names:
                self._refuse(name, "two sites of this function share one name")
            self.names[name] = locations.here()
        if kind in ("plate", "deterministic", "info"):
            if kind == "plate" and msg["args"][1] not in (None, msg["args"][0]):
                self._refuse(name, "a subsampled plate re-weights the model; use the whole plate")
            return
        if kind != "sample":
            reasons = {
                "param": "numpyro.param is learned, not given; pass the number in `u`",
                "prng_key": "numpyro.prng_key makes the step random outside of its sample sites",
                "control_flow": "control flow inside a step is not followed; write the step itself",
            }
            self._refuse(name, reasons.get(kind, f"NumPyro's `{kind}` is not supported"))
        self._check_sample(msg)
        observation = msg["value"] if msg["is_observed"] else None
        if is_delta(msg["fn"]):
            msg["value"] = msg["fn"].sample(jax.random.key(0), msg["kwargs"]["sample_shape"])
        elif (value := self.value_of(name, msg["fn"])) is not None:
            msg["value"] = value
        if msg["value"] is None:
            msg["value"] = jnp.zeros(msg["kwargs"]["sample_shape"] + msg["fn"].shape(), float)
        self.sites[name] = Site(
            name, msg["fn"], jnp.asarray(msg["value"]), observation, locations.here()
        )

    def _refuse(self, site: str, reason: str, kind: type = NotSupported) -> None:
        raise kind(self.function, site, reason, locations.here())

    def _check_sample(self, msg: Any) -> None:
        name, distribution = msg["name"], msg["fn"]
        base = innermost(distribution)
        if isinstance(base, dist.Unit):
            self._refuse(name, "numpyro.factor re-weights the model, which then has no Kalman form")
        if _masked(distribution):
            self._refuse(
                name, "masks are not followed; give a missing entry a large noise variance"
            )
        if msg["scale"] is not None:
            self._refuse(name, "handlers.scale and subsampling re-weight the site's log density")
        if msg["value"] is not None and not msg["is_observed"]:
            self._refuse(name, "its value is substituted by a handler; use numpyro.deterministic")
        if is_delta(distribution):
            if msg["is_observed"]:
                self._refuse(name, "an observed Delta has no noise; its variance must be positive")
            return
        if not isinstance(distribution, dist.Distribution):
            self._refuse(name, f"{type(distribution).__name__} is not a NumPyro distribution")
        if not _real_support(distribution):
            self._refuse(
                name,
                f"{type(base).__name__} has support {distribution.support}; a Gaussian's is every "
                "real number",
                NotLinearGaussian,
            )
        shape = tuple(msg["kwargs"]["sample_shape"]) + distribution.shape()
        if type(base) is not dist.Normal and math.prod(shape) > LARGEST_DENSE_SITE:
            self._refuse(
                name,
                f"a {type(base).__name__} of {math.prod(shape)} entries; above "
                f"{LARGEST_DENSE_SITE} only Normal sites are handled",
            )
        if msg["is_observed"] and not isinstance(msg["value"], jax.typing.ArrayLike):
            self._refuse(name, f"obs is a {type(msg['value']).__name__}; pass an array")
        if msg["is_observed"] and jnp.shape(msg["value"]) != shape:
            self._refuse(
                name, f"obs has shape {jnp.shape(msg['value'])}, but the site has shape {shape}"
            )


def _run(function: str, call: Callable[..., Any], arguments: tuple, watch: _Watch) -> Any:
    given = jax.tree.map(lambda leaf: leaf, arguments)  # containers that are the call's own
    try:
        # Parameters are checked later, by site and value (`inference.evaluation`).
        with validation_enabled(False), handlers.block(), handlers.seed(rng_seed=0), watch:
            returned = call(*given)
    except jax.errors.UnexpectedTracerError as error:
        raise NotSupported(function, "", EARLIER_CALL, locations.of_error(error)) from error
    except (ModelError, NotLinearGaussian, jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        raise
    except (TypeError, ValueError, AssertionError) as error:
        if not locations.raised_by_library(error):
            raise  # the user's own: no fact about the model
        reason = " ".join(str(error).split())
        raise NotSupported(
            function, "", f"raised {type(error).__name__}: {reason}", locations.of_error(error)
        ) from error
    after, before = jax.tree.flatten(given), jax.tree.flatten(arguments)
    same = after[1] == before[1] and all(map(operator.is_, after[0], before[0]))
    if not same:
        raise NotSupported(
            function,
            "",
            "changes its arguments in place, which later steps would see; return a new memory and "
            "leave `u` as it is",
        )
    return returned


def run_with_values(
    function: str,
    call: Callable[..., Any],
    arguments: tuple,
    values: Mapping[str, Array],
    names: dict[str, str] | None = None,
) -> tuple[Any, dict[str, Site]]:
    """Run `call(*arguments)` with each site at its value in `values`.

    Into `names` go the names of all sites, deterministic ones too, with their locations.
    """
    watch = _Watch(function, lambda name, distribution: values.get(name))
    returned = _run(function, call, arguments, watch)
    if names is not None:
        names.update(watch.names)
    return returned, watch.sites


def run_with_draws(
    function: str, call: Callable[..., Any], arguments: tuple, draws: Mapping[str, Array]
) -> tuple[Any, dict[str, Site]]:
    """Run `call(*arguments)` with each site at its mean plus its noise, driven by `draws`.

    `draws[site]` has the site's shape; where the site's law is N(m, E) its value is
    m + E^(1/2) draws, so that standard normal draws make this the model itself.
    """

    def value(name: str, distribution: dist.Distribution) -> Array | None:
        if name not in draws:
            return None
        mean, noise = moments(distribution, draws[name].shape)
        return mean + noise(draws[name])

    watch = _Watch(function, value)
    returned = _run(function, call, arguments, watch)
    return returned, watch.sites


Noise = Callable[[Array], Array]
"""The map from standard normal draws to a site's noise."""


def moments(distribution: dist.Distribution, shape: tuple[int, ...]) -> tuple[Array, Noise]:
    r"""Return the mean of a Gaussian site and its noise.

    A Normal's are read off its parameters. Any other Gaussian's follow from its log density,
    $E = (-\nabla^2 \log p)^{-1}$ and $m = E\,\nabla \log p(0)$. Both are compared with plain
    evaluations of the log density before they are used (`inference.evaluation`).
    """
    base = innermost(distribution)
    if type(base) is dist.Normal:
        mean = jnp.broadcast_to(distribution.mean, shape)
        deviation = jnp.broadcast_to(jnp.sqrt(distribution.variance), shape)
        return mean, lambda draws: deviation * draws
    size = math.prod(shape)

    def log_density(value: Array) -> Array:
        return jnp.sum(distribution.log_prob(value.reshape(shape)))

    origin = jnp.zeros(size, float)
    precision = -jax.hessian(log_density)(origin)
    factor = jnp.linalg.cholesky(precision)
    mean = jax.scipy.linalg.cho_solve((factor, True), jax.grad(log_density)(origin))

    def noise(draws: Array) -> Array:
        white = jax.scipy.linalg.solve_triangular(factor, draws.ravel(), lower=True, trans=1)
        return white.reshape(shape)

    return mean.reshape(shape), noise
