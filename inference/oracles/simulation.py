"""Oracle 3: simulation from the model's own prior.

Memories, read-outs and observed values are drawn together; the filter under test sees the values.
If it is exact, its errors in units of its own claimed deviation are standard normal (moments,
chi-square, PIT) and uncorrelated with everything it saw (orthogonality, which catches a wrong gain
that moments do not).
"""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array
from scipy import stats

from design_models import DesignModel

from ..claim import Claimant
from .check import Check
from .program import Program
from .statistics import FALSE_ALARM, impossible, largest, moments, whiten

ORACLE = "simulation"
DRAWS = 20_000
_MOST_PRODUCTS = 400


def judge(
    model: DesignModel, claim: Claimant, inputs: Mapping[str, Array], *, seed: int
) -> list[Check]:
    """Compare a claim about the last step with simulated truth."""
    program = Program(model, inputs)
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    memory, output, seen = jax.jit(jax.vmap(program.simulate))(keys)
    return compare(claim, inputs, *(np.asarray(part) for part in (memory, output, seen)))


def compare(
    claim: Claimant,
    inputs: Mapping[str, Array],
    memory: np.ndarray,
    output: np.ndarray,
    seen: np.ndarray,
) -> list[Check]:
    """Compare a claim with draws that were made before."""
    last = jax.jit(
        jax.vmap(
            lambda values: jax.tree.map(lambda part: part[-1], claim(inputs, values)),
        )
    )(seen)
    means, output_means = np.asarray(last.means), np.asarray(last.output_means)
    covariance, variances = np.asarray(last.covariances[0]), np.asarray(last.output_variances[0])
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
