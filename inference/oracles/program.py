"""A design model's sequence as the oracles see it: a NumPyro program over one latent vector."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from design_models import DesignModel

Latents = Float[Array, " latent"]
Seen = Float[Array, "time seen"]


class _FixDeltas(Messenger):
    """Turn latent Delta sites, which are not random, into deterministic ones."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        base = msg["fn"]
        while isinstance(base, dist.Independent | dist.ExpandedDistribution):
            base = base.base_dist
        if isinstance(base, dist.Delta):
            msg["value"] = msg["fn"].sample(jax.random.key(0), msg["kwargs"]["sample_shape"])
            msg["type"] = "deterministic"


class _Unobserve(Messenger):
    """Draw observed sites instead of fixing them."""

    def __init__(self, fn: Any) -> None:
        self.names: list[str] = []
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            self.names.append(msg["name"])
            msg["is_observed"] = False
            msg["value"] = None


class Program:
    """The sequence of `model` under `inputs`: its density, its draws, its last memory and output.

    Args:
        model: the design model.
        inputs: arrays with a leading time axis.
    """

    def __init__(self, model: DesignModel, inputs: Mapping[str, Array]) -> None:
        self.steps = len(jax.tree.leaves(inputs)[0])
        self.run = _FixDeltas(model.sequence(inputs))
        traced = handlers.trace(handlers.seed(self.run, 0)).get_trace()
        sites = {name: site for name, site in traced.items() if site["type"] == "sample"}
        self.observed = {n: s["value"] for n, s in sites.items() if s["is_observed"]}
        latents = {
            n: jnp.zeros(jnp.shape(s["value"]), float)
            for n, s in sites.items()
            if not s["is_observed"]
        }
        flat, self.unravel = ravel_pytree(latents)
        self.size = flat.size

    def conditions(self, seen: Seen) -> dict[str, Array]:
        """Values of the observed sites, in the order in which a step meets them."""
        flat, values = jnp.ravel(seen), {}
        start = 0
        for name, value in self.observed.items():
            size = jnp.size(value)
            values[name] = flat[start : start + size].reshape(jnp.shape(value))
            start += size
        return values

    def seen(self) -> Seen:
        """The observed values that the inputs hold."""
        flat = [jnp.ravel(jnp.asarray(value, float)) for value in self.observed.values()]
        return jnp.concatenate(flat).reshape(self.steps, -1)

    def log_joint(self, latents: Latents, seen: Seen) -> Float[Array, ""]:
        """Log density of latent and observed sites together, by NumPyro alone."""
        values: dict[str, Any] = {**self.conditions(seen)}
        conditioned = handlers.condition(self.run, values)
        return jnp.asarray(log_density(conditioned, (), {}, self.unravel(latents))[0])

    def outcome(self, latents: Latents) -> tuple[Float[Array, " entry"], Float[Array, " output"]]:
        """The memory after the last step, and its read-out, as functions of the latents."""
        with handlers.block():
            given: Any = handlers.substitute(handlers.seed(self.run, 0), self.unravel(latents))
            memories, output = given()
        return ravel_pytree(memories[-1])[0], ravel_pytree(output)[0]

    def simulate(self, rng: PRNGKeyArray) -> tuple[Array, Array, Seen]:
        """Draw (last memory, read-out, observed values) from the model's own prior."""
        drawn: Any = _Unobserve(self.run)
        with handlers.trace() as traced, handlers.seed(rng_seed=rng):
            memories, output = drawn()
        seen = [jnp.ravel(traced[name]["value"]) for name in self.observed]
        return (
            ravel_pytree(memories[-1])[0],
            ravel_pytree(output)[0],
            jnp.concatenate(seen).reshape(self.steps, -1),
        )
