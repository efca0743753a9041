"""Oracle 2: NUTS on the same model.

Observed values are amplified: the posterior covariance does not depend on them, so errors of the
gain grow while the Monte Carlo error stays. Draws of the last memory and read-out are compared
with the claim in units of Monte Carlo standard error (ArviZ), over all statistics together at the
false-alarm rate of `statistics.FALSE_ALARM`. A chain that has not converged decides nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer import MCMC, NUTS

from design_models import DesignModel

from ..claim import Claim, Claimant
from .check import Check
from .program import Program, Seen
from .statistics import impossible, largest, moments, whiten

ORACLE = "NUTS"
AMPLIFICATION = 10.0
CHAINS = 4
_WARMUP, _FEWEST_DRAWS, _MOST_DRAWS = 500, 1000, 4000
_DRAWN_NUMBERS = 80_000
_LARGEST_RHAT, _SMALLEST_ESS = 1.01, 400


@dataclass(frozen=True)
class Posterior:
    """Draws (chain, draw, entry) of the last memory and read-out, and how the chains did."""

    memory: Float[np.ndarray, "chain draw entry"]
    output: Float[np.ndarray, "chain draw output"]
    rhat: float
    ess: float
    divergences: int


def sampler(model: DesignModel) -> Callable[[Mapping[str, Array], Seen, int], Posterior]:
    """Return (inputs, seen, seed) -> draws of the posterior, compiled once for each length.

    A chain that mixed badly is run again, longer.
    """

    @partial(jax.jit, static_argnames="lengthen")
    def run(inputs: Mapping[str, Array], seen: Seen, rng: PRNGKeyArray, lengthen: int):
        program = Program(model, inputs)
        # Statistics sum over entries: the fewer there are, the more draws it takes.
        draws = max(_FEWEST_DRAWS, min(_MOST_DRAWS, _DRAWN_NUMBERS // program.size))
        kernel = NUTS(
            potential_fn=lambda latents: -program.log_joint(latents, seen),
            dense_mass=program.size <= 200,
        )
        mcmc = MCMC(
            kernel,
            num_warmup=_WARMUP,
            num_samples=lengthen * draws,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(rng, init_params=jnp.zeros((CHAINS, program.size), float))
        latents = mcmc.get_samples(group_by_chain=True)
        divergences = jnp.sum(mcmc.get_extra_fields()["diverging"])
        return *jax.vmap(jax.vmap(program.outcome))(latents), divergences

    def sample(inputs: Mapping[str, Array], seen: Seen, seed: int) -> Posterior:
        array_stats = _arviz()
        for lengthen in (1, 4):
            memory, output, divergences = (
                np.asarray(part) for part in run(inputs, seen, jax.random.key(seed), lengthen)
            )
            draws = np.concatenate([memory, output], axis=-1)
            varying = np.ptp(draws, axis=(0, 1)) > 0
            rhat = array_stats.rhat(draws[..., varying], chain_axis=0, draw_axis=1)
            ess = array_stats.ess(draws[..., varying], chain_axis=0, draw_axis=1)
            posterior = Posterior(
                memory, output, float(np.max(rhat)), float(np.min(ess)), int(divergences)
            )
            if posterior.rhat < _LARGEST_RHAT and posterior.ess > _SMALLEST_ESS:
                break
        return posterior

    return sample


def judge(
    model: DesignModel,
    claim: Claimant,
    inputs: Mapping[str, Array],
    seen: Seen,
    *,
    seed: int,
) -> list[Check]:
    """Compare a claim about the last step with draws of the posterior."""
    amplified = AMPLIFICATION * seen
    posterior = sampler(model)(inputs, amplified, seed)
    return compare(jax.jit(claim)(inputs, amplified), posterior)


def compare(claimed: Claim, posterior: Posterior) -> list[Check]:
    """Compare what a filter said of the amplified values with draws of the posterior."""
    checks = [
        Check(ORACLE, "R-hat", posterior.rhat, _LARGEST_RHAT, "ratio"),
        Check(ORACLE, "400 / effective draws", _SMALLEST_ESS / posterior.ess, 1.0, "ratio"),
        Check(ORACLE, "divergences", float(posterior.divergences), 0.0, "count"),
    ]
    memory = whiten(
        posterior.memory, np.asarray(claimed.means[-1]), np.asarray(claimed.covariances[-1])
    )
    output = whiten(
        posterior.output,
        np.asarray(claimed.output_means[-1]),
        np.diag(claimed.output_variances[-1]),
    )
    if memory is None:
        return [*checks, impossible(ORACLE, "memory")]
    if output is None:
        return [*checks, impossible(ORACLE, "read-out")]
    found = {"memory": scores(moments(memory))}
    # Read-outs of different rows may be correlated: only their margins are compared.
    found["read-out"] = scores(np.concatenate([output, output**2 - 1], axis=-1))
    total = sum(len(part) for part in found.values())
    return checks + [largest(ORACLE, name, part, total) for name, part in found.items()]


def scores(statistic: Float[np.ndarray, "chain draw statistic"]) -> Float[np.ndarray, " statistic"]:
    """Z scores of statistics whose mean should be zero, by ArviZ's Monte Carlo error."""
    found: Any = _arviz().mcse(statistic, chain_axis=0, draw_axis=1, method="mean")
    error = np.asarray(found, float)
    return np.mean(statistic, axis=(0, 1)) / error


def _arviz() -> Any:
    """ArviZ's statistics of plain arrays, imported where chains are judged and nowhere else.

    Layers compile filters that were verified elsewhere, on machines that need no ArviZ.
    """
    from arviz_stats.base.array import array_stats

    return array_stats
