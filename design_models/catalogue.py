"""Known recurrences, each as a design model and a covariance policy.

Gated KalmaNet (arXiv 2511.21016) is not among them: its read-out ridge grows with the norm of the
state, so it is the filter of no stated model.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .associative_regression import associative_regression
from .design_model import DesignModel
from .errors import ModelError
from .increment_evidence import continuous_increment_evidence, increment_evidence
from .independent_entries import independent_entries, independent_entries_with_crosstalk
from .policy import Diagonal, Exact, Forget, Isotropic, Policy, Reset

REGRESSION = "associative regression"
INCREMENTS = "evidence about increments"
ENTRIES = "independent entries"


@dataclass(frozen=True)
class Recurrence:
    """A published recurrence as a design model and what is done to its covariance.

    Args:
        name: the key in `CATALOGUE`.
        title: the name its paper uses.
        design: `design(value_width, key_width) -> DesignModel`.
        assumption: which design model it is, in a few words.
        policy: `Exact` where the recurrence is the model's own filter, else the reduction.
        paper: authors, year and arXiv number.
        note: what is exact and what is a reduction.
    """

    name: str
    title: str
    design: Callable[[int, int], DesignModel]
    assumption: str
    policy: Policy
    paper: str
    note: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Compiled paths its filter qualifies for, slowest first."""
        fast = self.assumption != ENTRIES  # rows share one covariance, or writes add up
        return ("token", "chunked", "parallel") if fast else ("token", "parallel")

    def model(self, value_width: int = 3, key_width: int = 2) -> DesignModel:
        """Return the design model at these widths; small ones verify fastest.

        Raises:
            ModelError: a width is below 1.
        """
        return self.design(value_width, key_width)


def recurrence(name: str) -> Recurrence:
    """Look up a recurrence of the catalogue.

    Raises:
        ModelError: there is none of that name; the message names the closest.
    """
    if name not in CATALOGUE:
        wanted = name.lower().replace("-", "_").replace(" ", "_")
        close = difflib.get_close_matches(wanted, CATALOGUE, n=3, cutoff=0.6)
        known = (
            f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(CATALOGUE)}."
        )
        raise ModelError(f"there is no recurrence named {name!r}; {known}")
    return CATALOGUE[name]


RETENTION = 1 - 2.0**-5
"""Decay of RetNet's first head; head h retains 1 − 2^(−5−h)."""


def _retention(value_width: int, key_width: int) -> DesignModel:
    model = increment_evidence(value_width, key_width, decay="scalar")

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        return {**model.draw_inputs(rng, steps), "decay": jnp.full((steps,), RETENTION)}

    return replace(model, inputs=inputs)


def _fading_regression(value_width: int, key_width: int) -> DesignModel:
    model = associative_regression(value_width, key_width)

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        rng_forget, rng_strength, rng_rest = jax.random.split(rng, 3)
        write_strength = jax.random.uniform(rng_strength, (steps,), minval=0.2, maxval=0.95)
        return {
            **model.draw_inputs(rng_rest, steps),
            "noise": 1 / write_strength,
            "forget": jax.random.uniform(rng_forget, (steps,), minval=0.8, maxval=1.0),
        }

    return replace(model, inputs=inputs)


_RECURRENCES = (
    Recurrence(
        "linear_attention",
        "Linear attention",
        increment_evidence,
        INCREMENTS,
        Exact(),
        "Katharopoulos et al. (2020), arXiv 2006.16236",
        "exact at every noise level; the unnormalised form, its feature map applied beforehand",
    ),
    Recurrence(
        "retnet",
        "RetNet",
        _retention,
        INCREMENTS,
        Exact(),
        "Sun et al. (2023), arXiv 2307.08621",
        "exact, with a decay that is constant in time; rotations of key and query come beforehand",
    ),
    Recurrence(
        "gla",
        "Gated Linear Attention",
        partial(increment_evidence, decay="key"),
        INCREMENTS,
        Exact(),
        "Yang et al. (2023), arXiv 2312.06635",
        "exact, with one decay per key",
    ),
    Recurrence(
        "mamba2",
        "Mamba-2 (SSD)",
        continuous_increment_evidence,
        INCREMENTS,
        Exact(),
        "Dao & Gu (2024), arXiv 2405.21060",
        "exact in continuous time: the step size is elapsed time; the skip connection D is outside",
    ),
    Recurrence(
        "deltanet",
        "DeltaNet",
        associative_regression,
        REGRESSION,
        Reset(1.0),
        "Schlag et al. (2021), arXiv 2102.11174; Yang et al. (2024), arXiv 2406.06484",
        "reduction: covariance reset before each write; β = 1/(‖k‖² + r)",
    ),
    Recurrence(
        "gated_deltanet",
        "Gated DeltaNet",
        partial(associative_regression, decay="scalar"),
        REGRESSION,
        Reset(1.0),
        "Yang et al. (2024), arXiv 2412.06464",
        "reduction: covariance reset before each write; β = 1/(‖k‖² + r)",
    ),
    Recurrence(
        "kda",
        "Kimi Delta Attention",
        partial(associative_regression, decay="key"),
        REGRESSION,
        Reset(1.0),
        "Kimi Team (2025), arXiv 2510.26692",
        "reduction: covariance reset before each write, one decay per key; β = 1/(‖k‖² + r)",
    ),
    Recurrence(
        "deltaproduct",
        "DeltaProduct",
        partial(associative_regression, observations=2),
        REGRESSION,
        Reset(1.0),
        "Siems et al. (2025), arXiv 2502.10297",
        "reduction: two observations a step, covariance reset before each of them in turn; "
        "reflections (β‖k‖² > 1) have no noise variance",
    ),
    Recurrence(
        "longhorn",
        "Longhorn",
        independent_entries_with_crosstalk,
        ENTRIES,
        Reset(1.0),
        "Liu et al. (2024), arXiv 2407.14207",
        "reduction: covariance reset, and entries taken as independent (the paper's diagonal step)",
    ),
    Recurrence(
        "mesanet",
        "MesaNet",
        _fading_regression,
        REGRESSION,
        Forget(),
        "von Oswald et al. (2025), arXiv 2506.05233",
        "reduction: evidence fades towards the prior; exact where nothing is forgotten; 1/r = β, "
        "prior precision 1 (its value at the start of training)",
    ),
    Recurrence(
        "kalman_linear_attention",
        "Kalman Linear Attention",
        independent_entries,
        ENTRIES,
        Exact(),
        "Shaj et al. (2026), arXiv 2602.10743",
        "exact for independent entries, a model that counts one value once per column",
    ),
    Recurrence(
        "kalman_delta_isotropic",
        "Kalman Delta Network, isotropic",
        partial(associative_regression, decay="key", drift="scalar"),
        REGRESSION,
        Isotropic(),
        "Bui, Huang & Ying (2026), arXiv 2609.07816",
        "reduction: one variance for all keys; as shipped a token's information counts K times",
    ),
    Recurrence(
        "kalman_delta_diagonal",
        "Kalman Delta Network, diagonal",
        partial(associative_regression, decay="key", drift="key"),
        REGRESSION,
        Diagonal(),
        "Bui, Huang & Ying (2026), arXiv 2609.07816",
        "reduction: one variance per key; as shipped a token's information counts K times",
    ),
    Recurrence(
        "bayesian_static",
        "Bayesian linear regression",
        associative_regression,
        REGRESSION,
        Exact(),
        "Dowling et al. (2026), arXiv 2605.31163",
        "exact: a memory that neither decays nor drifts, so the posterior is the ridge solution",
    ),
    Recurrence(
        "bayesian_layer",
        "Bayesian Layer",
        partial(associative_regression, decay="scalar", drift="scalar"),
        REGRESSION,
        Exact(),
        "Dowling et al. (2026), arXiv 2605.31163",
        "exact: the full covariance steers every write",
    ),
)

CATALOGUE: dict[str, Recurrence] = {entry.name: entry for entry in _RECURRENCES}
