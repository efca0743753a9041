r"""Coefficients of a certified regression memory at a token, in a few evaluations of its model.

Where rows share one covariance and time acts on keys one by one, row 0 of the memory says it all:

    decay a      transition moves a row of ones to a          (one derivative)
    drift q      covariance of the transition's noise, applied to ones
    keys k       the observations of row 0, differentiated    (one for each observation)
    noise r      variance of each of them
    query x      the first output, differentiated; and the variance of its own noise

so nothing the size of the memory squared is formed. That a model has this form was found by
`inference.structure`; that these numbers are its coefficients is checked when it is compiled.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from inference.exact_filter import ExactFilter
from inference.extraction import affine_map, draws_size, noise_response, observed_values

TOLERANCE = 1e-9


class Coefficients(eqx.Module):
    """One token's coefficients; with a leading axis, a sequence's."""

    decay: Float[Array, "*time key"]
    drift: Float[Array, "*time key"]
    key: Float[Array, "*time observation key"]
    noise: Float[Array, "*time observation"]
    value: Float[Array, "*time observation value"]
    query: Float[Array, "*time key"]
    output_noise: Float[Array, "*time"]
    log_evidence: Float[Array, "*time"] | None = None
    """Of what is seen of the change alone."""


def coefficients(exact: ExactFilter, u: Mapping[str, Array]) -> Coefficients:
    """One token's coefficients; `u` may be traced."""
    proof, partition = exact.proof, exact.partition
    rows = partition.states[0]
    state = jnp.zeros(rows.size, float)
    moved = affine_map(proof.transition, proof.memory, u)
    draws = jnp.zeros(draws_size(proof.transition), float)
    ones = state.at[rows[0]].set(1)
    row = jax.jvp(lambda state: moved(state, draws)[0], (state,), (ones,))[1]
    shaken = noise_response(moved, state, draws)
    drift = shaken(ones, jnp.zeros_like(moved(state, draws)[1]))[0]
    assert partition.observed is not None
    seen = affine_map(proof.observe, proof.memory, u)
    draws = jnp.zeros(draws_size(proof.observe), float)
    places = partition.observed[0]
    returned = jnp.zeros_like(seen(state, draws)[0])
    _, pull = jax.vjp(lambda state: seen(state, draws)[1], state)
    noise = noise_response(seen, state, draws)
    zero = jnp.zeros(places.size, float)
    keys, noises = [], []
    for place in places[0]:
        unit = zero.at[place].set(1)
        keys.append(pull(unit)[0][rows[0]])
        noises.append(noise(returned, unit)[1][place])
    query, output_noise = first_output(exact, u, rows[0])
    return Coefficients(
        row[rows[0]],
        drift[rows[0]],
        jnp.stack(keys),
        jnp.stack(noises),
        observed_values(proof, u)[1][places].T,
        query,
        output_noise,
    )


def first_output(
    exact: ExactFilter, u: Mapping[str, Array], row: np.ndarray
) -> tuple[Float[Array, " key"], Float[Array, ""]]:
    """How the first output reads the entries of a row, and the variance of its own noise."""
    read = affine_map(exact.proof.readout, exact.proof.memory, u)
    state = jnp.zeros(exact.partition.states.size, float)
    draws = jnp.zeros(draws_size(exact.proof.readout), float)
    output, pull = jax.vjp(lambda state: read(state, draws)[0], state)
    query = pull(jnp.zeros_like(output).at[0].set(1))[0][row]
    of_draws = jax.vjp(lambda draws: read(state, draws)[0][0], draws)[1](jnp.ones(()))[0]
    return query, jnp.sum(of_draws**2)


def why_not(exact: ExactFilter) -> str:
    """Why these coefficients do not describe the filter; "" where they do.

    Compared, at the filter's examples, with the coefficients that were certified and with the
    read-out's own.
    """
    structure = exact.structure
    if structure.kind != "shared rows" or "chunked" not in structure.paths:
        return structure.why_paths
    found = _at_examples(exact)
    own, steps, prior = found.own, found.steps, found.prior
    given = steps.observation
    assert given is not None
    if np.any(np.abs(prior.mean) > 0):
        return "the prior's mean is not zero"
    if _mixes(prior.covariance):
        return "keys are correlated in the prior"
    if _mixes(given.noise):
        return "the noise of a token's observations is correlated"
    if not _same_steps(own, steps):
        return "coefficients read at one row are not those of all"
    return reads_otherwise((found.matrix, found.shift, found.noise), own, exact.partition.states[0])


def reads_otherwise(read: tuple[Any, Any, Any], own: Any, rows: np.ndarray) -> str:
    """Why a read-out is not memory @ query; "" where it is.

    Args:
        read: its matrix, shift and noise at several tokens, as `reading` found them.
        own: the query and the output noise that were found at them.
        rows: places of the memory's rows.
    """
    matrix, shift, noise = read
    if not same(matrix, _rows_read_alike(own.query, rows)):
        return "the read-out is not the memory times one query"
    if np.any(np.abs(shift) > TOLERANCE):
        return "the read-out adds a constant"
    if not same(noise, np.broadcast_to(own.output_noise[:, None], noise.shape)):
        return "outputs have noises of their own"
    return ""


class _Found(NamedTuple):
    """What a filter says at its examples, in NumPy: float64 also where JAX has none."""

    own: Any
    steps: Any
    matrix: np.ndarray
    shift: np.ndarray
    noise: np.ndarray
    prior: Any


def _at_examples(exact: ExactFilter) -> _Found:
    def at(u):
        return coefficients(exact, u), exact.coefficients(u), *reading(exact, u)

    @jax.jit
    def find(examples):
        return *jax.vmap(at)(examples), exact.initial()

    with jax.enable_x64(True):
        return _Found(*jax.tree.map(np.asarray, find(dict(exact.examples))))


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and np.allclose(
        first, second, rtol=TOLERANCE, atol=TOLERANCE
    )


def _mixes(matrices: np.ndarray) -> bool:
    """Whether a matrix is not diagonal."""
    return bool(np.any(np.abs(matrices * (1 - np.eye(matrices.shape[-1]))) > TOLERANCE))


def _same_steps(own, steps) -> bool:
    given = steps.observation
    pairs = (
        (_diagonal(own.decay), steps.transition[:, 0]),
        (_diagonal(own.drift), steps.drift[:, 0]),
        (own.key, given.observation[:, 0]),
        (_diagonal(own.noise), given.noise[:, 0]),
    )
    return all(same(first, second) for first, second in pairs)


def _diagonal(rates: np.ndarray) -> np.ndarray:
    return rates[..., None] * np.eye(rates.shape[-1])


def reading(exact: ExactFilter, u: Mapping[str, Array]):
    """The read-out's matrix, shift and noise variances."""
    read = affine_map(exact.proof.readout, exact.proof.memory, u)
    state = jnp.zeros(exact.partition.states.size, float)
    draws = jnp.zeros(draws_size(exact.proof.readout), float)
    matrix = jax.jacrev(lambda state: read(state, draws)[0])(state)
    noise = jax.jacrev(lambda draws: read(state, draws)[0])(draws)
    return matrix, read(state, draws)[0], jnp.sum(noise**2, axis=-1)


def _rows_read_alike(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The matrix of `memory @ query`: output i reads row i."""
    matrix = np.zeros((len(queries), len(rows), rows.size))
    for i, row in enumerate(rows):
        matrix[:, i, row] = queries
    return matrix
