"""Oracle 3: simulation from the model's own prior.

Memories, read-outs and observed values are drawn together; the filter under test sees the values.
If it is exact, its errors in units of its own claimed deviation are standard normal (moments,
chi-square, PIT) and uncorrelated with everything it saw (orthogonality, which catches a wrong gain
that moments do not).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
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


@dataclass(frozen=True)
class Truth:
    """Draws of the last memory, its read-out, and all observed values, from the model's prior."""

    memory: Float[np.ndarray, "draw entry"]
    output: Float[np.ndarray, "draw output"]
    seen: Float[np.ndarray, "draw time seen"]


class LastBeliefs(eqx.Module):
    """What a filter says after the last step; only its means depend on the values seen."""

    means: Float[Array, "draw entry"]
    output_means: Float[Array, "draw output"]
    covariance: Float[Array, "entry entry"]
    output_variances: Float[Array, " output"]


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
    truth = simulator(model)(inputs, seed)
    said = jax.jit(partial(last_beliefs, claim))(inputs, truth.seen)
    return compare(said, truth)


def last_beliefs(
    claim: Claimant, inputs: Mapping[str, Array], seen: Float[Array, "draw time seen"]
) -> LastBeliefs:
    """What a filter says at the end of every draw."""

    def means(values: Float[Array, "time seen"]) -> tuple[Array, Array]:
        said = claim(inputs, values)
        return said.means[-1], said.output_means[-1]

    first = claim(inputs, seen[0])
    return LastBeliefs(*jax.vmap(means)(seen), first.covariances[-1], first.output_variances[-1])


def compare(said: LastBeliefs, truth: Truth) -> list[Check]:
    """Compare what a filter said of simulated values with the truth."""
    errors = truth.memory - np.asarray(said.means)
    output_errors = truth.output - np.asarray(said.output_means)
    white = whiten(errors, np.zeros(errors.shape[-1]), np.asarray(said.covariance))
    white_output = whiten(
        output_errors, np.zeros(output_errors.shape[-1]), np.diag(said.output_variances)
    )
    if white is None or white_output is None:
        return [impossible(ORACLE, "memory" if white is None else "read-out")]
    values = truth.seen.reshape(len(truth.seen), -1)
    values = values / np.std(values, axis=0)
    scores = {
        "moments": _scores(moments(white)),
        "read-out": _scores(np.concatenate([white_output, white_output**2 - 1], axis=-1)),
        "orthogonality": _product_scores(white, values),
        "read-out orthogonality": _product_scores(white_output, values),
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


def _product_scores(errors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scores of the mean product of every error with every value."""
    count = len(errors)
    mean = errors.T @ values / count
    spread = np.sqrt((errors**2).T @ values**2 / count - mean**2) / np.sqrt(count)
    return np.ravel(mean / spread)


def _scores(statistic: np.ndarray) -> np.ndarray:
    spread = np.std(statistic, axis=0) / np.sqrt(len(statistic))
    return np.mean(statistic, axis=0) / spread
