"""Oracle 3: simulation from the model's own prior.

Memories, read-outs and observed values are drawn together; the filter under test sees the values.
If it is exact, its errors in units of its own claimed deviation are standard normal (moments,
chi-square, PIT) and uncorrelated with everything it saw (orthogonality, which catches a wrong gain
that moments do not).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import stats

from design_models import DesignModel

from ..claim import Claimant
from .check import Check
from .program import Program
from .statistics import FALSE_ALARM, impossible, largest, moments, whiten

ORACLE = "simulation"
_FEWEST_DRAWS, _MOST_DRAWS = 20_000, 100_000
_DRAWN_NUMBERS = 4_000_000
_MOST_PRODUCTS = 400


@dataclass(frozen=True)
class Truth:
    """Draws of the last memory, its read-out, and all observed values, from the model's prior."""

    memory: Float[np.ndarray, "draw entry"]
    output: Float[np.ndarray, "draw output"]
    seen: Float[np.ndarray, "draw time seen"]


def simulator(model: DesignModel) -> Callable[[Mapping[str, Array], int], Truth]:
    """Return (inputs, seed) -> truth, compiled once for each length."""

    @jax.jit
    def draw(inputs: Mapping[str, Array], rng: PRNGKeyArray):
        program = Program(model, inputs)
        draws = max(_FEWEST_DRAWS, min(_MOST_DRAWS, _DRAWN_NUMBERS // program.size))
        return jax.vmap(program.simulate)(jax.random.split(rng, draws))

    def simulate(inputs: Mapping[str, Array], seed: int) -> Truth:
        return Truth(*(np.asarray(part) for part in draw(inputs, jax.random.key(seed))))

    return simulate


def judge(
    model: DesignModel, claim: Claimant, inputs: Mapping[str, Array], *, seed: int
) -> list[Check]:
    """Compare a claim about the last step with simulated truth."""
    return compare(claim, inputs, simulator(model)(inputs, seed))


def compare(claim: Claimant, inputs: Mapping[str, Array], truth: Truth) -> list[Check]:
    """Compare a claim with draws that were made before."""
    memory, output, seen = truth.memory, truth.output, truth.seen
    means, output_means, covariance, variances = (
        np.asarray(part) for part in _last_step(claim, inputs, jnp.asarray(seen))
    )
    white = whiten(memory - means, np.zeros(means.shape[-1]), covariance)
    white_output = whiten(
        output - output_means, np.zeros(output_means.shape[-1]), np.diag(variances)
    )
    if white is None or white_output is None:
        return [impossible(ORACLE, "memory" if white is None else "read-out")]
    values = seen.reshape(len(seen), -1)
    values = values / np.std(values, axis=0)
    scores = {
        "moments": _scores(moments(white)),
        "read-out": _scores(np.concatenate([white_output, white_output**2 - 1], axis=-1)),
        "orthogonality": _scores(_products(white, values)),
        "read-out orthogonality": _scores(_products(white_output, values)),
    }
    uniform = {
        "chi-square": stats.kstest(np.sum(white**2, axis=-1), stats.chi2(white.shape[-1]).cdf),
        "read-out PIT": stats.kstest(stats.norm.cdf(white_output[:, 0]), "uniform"),
    }
    total = sum(len(part) for part in scores.values()) + len(uniform)
    checks = [largest(ORACLE, name, part, total) for name, part in scores.items()]
    for name, test in uniform.items():
        threshold = -float(np.log10(FALSE_ALARM / total))
        surprise = -float(np.log10(max(test.pvalue, 1e-300)))
        checks.append(Check(ORACLE, name, surprise, threshold, "-log10 p"))
    return checks


@partial(jax.jit, static_argnames="claim")
def _last_step(
    claim: Claimant, inputs: Mapping[str, Array], seen: Float[Array, "draw time seen"]
) -> tuple[Array, Array, Array, Array]:
    """Means of memory and read-out for every draw; covariance and variances of the first."""

    def means(values: Float[Array, "time seen"]) -> tuple[Array, Array]:
        said = claim(inputs, values)
        return said.means[-1], said.output_means[-1]

    said = claim(inputs, seen[0])
    return *jax.vmap(means)(seen), said.covariances[-1], said.output_variances[-1]


def _products(errors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Products of errors and values; random pairs where there are very many."""
    pairs = np.indices((errors.shape[1], values.shape[1])).reshape(2, -1)
    if pairs.shape[1] > _MOST_PRODUCTS:
        chosen = np.random.default_rng(2).choice(pairs.shape[1], _MOST_PRODUCTS, replace=False)
        pairs = pairs[:, chosen]
    return errors[:, pairs[0]] * values[:, pairs[1]]


def _scores(statistic: np.ndarray) -> np.ndarray:
    spread = np.std(statistic, axis=0) / np.sqrt(len(statistic))
    return np.mean(statistic, axis=0) / spread
