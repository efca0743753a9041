r"""When an answer had better be withheld: signals of doubt, judged by the answers they let through.

A memory that answers where its signal is lowest covers a share of the questions, and its risk is
the mean loss of those answers. A signal that knows everything answers in order of loss.

Source: El-Yaniv & Wiener (2010), "On the foundations of noise-free selective classification".
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

Signal = Float[np.ndarray, " question"]


def auroc(signal: Signal, wrong: np.ndarray) -> float:
    """Probability that a wrong answer has the higher signal than a right one; ties count half."""
    positive = int(wrong.sum())
    negative = len(wrong) - positive
    if not positive or not negative:
        return float("nan")
    ranks = stats.rankdata(signal)
    return float((ranks[wrong].sum() - positive * (positive + 1) / 2) / (positive * negative))


def risk_by_coverage(signal: Signal, loss: Signal) -> Signal:
    """Mean loss of the answers with the lowest signals, for every number of them from one on.

    Answers of the same signal cannot be told apart: each counts their mean loss.

    Args:
        signal: doubt of each answer.
        loss: of each answer: 0 or 1 where it is right or wrong, or its squared error.
    """
    groups = np.unique(signal, return_inverse=True)[1]
    shared = np.bincount(groups, loss) / np.bincount(groups)
    order = np.argsort(signal, kind="stable")
    return np.cumsum(shared[groups[order]]) / np.arange(1, len(loss) + 1)
