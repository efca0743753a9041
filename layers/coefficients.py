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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from inference.exact_filter import ExactFilter
from inference.extraction import affine_map, draws_size, noise_response, observed_values
from inference.linear_gaussian import Step

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
    read = affine_map(proof.readout, proof.memory, u)
    draws = jnp.zeros(draws_size(proof.readout), float)
    output, pull = jax.vjp(lambda state: read(state, draws)[0], state)
    query = pull(jnp.zeros_like(output).at[0].set(1))[0][rows[0]]
    of_draws = jax.vjp(lambda draws: read(state, draws)[0][0], draws)[1](jnp.ones(()))[0]
    return Coefficients(
        row[rows[0]],
        drift[rows[0]],
        jnp.stack(keys),
        jnp.stack(noises),
        observed_values(proof, u)[1][places].T,
        query,
        jnp.sum(of_draws**2),
    )


def why_not(exact: ExactFilter) -> str:
    """Why these coefficients do not describe the filter; "" where they do.

    Compared, at the filter's examples, with the coefficients that were certified and with the
    read-out's own.
    """
    structure = exact.structure
    if structure.kind != "shared rows" or "chunked" not in structure.paths:
        return structure.why_paths
    inputs = dict(exact.examples)
    with jax.enable_x64(True):

        def at(u):
            return coefficients(exact, u), exact.coefficients(u), _reading(exact, u)

        own, steps, reads = jax.jit(jax.vmap(at))(inputs)
        prior = exact.initial()
    if np.any(np.abs(prior.mean) > 0):
        return "the prior's mean is not zero"
    if np.any(_off_diagonal(np.asarray(prior.covariance[0]))):
        return "keys are correlated in the prior"
    given = steps.observation
    assert given is not None
    if any(
        np.any(np.abs(_off_diagonal(noise)) > TOLERANCE) for noise in np.asarray(given.noise[:, 0])
    ):
        return "the noise of a token's observations is correlated"
    if not _same_steps(own, steps):
        return "coefficients read at one row are not those of all"
    matrix, shift, noise = (np.asarray(part) for part in reads)
    expected = _rows_read_alike(np.asarray(own.query), exact.partition.states[0])
    if matrix.shape != expected.shape or not np.allclose(matrix, expected, atol=TOLERANCE):
        return "the read-out is not the memory times one query"
    if np.any(np.abs(shift) > TOLERANCE):
        return "the read-out adds a constant"
    alike = np.asarray(own.output_noise)[:, None]
    if not np.allclose(noise, alike, atol=TOLERANCE):
        return "outputs have noises of their own"
    return ""


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix - np.diag(np.diagonal(matrix))


def _same_steps(own: Coefficients, steps: Step) -> bool:
    given = steps.observation
    assert given is not None
    pairs = (
        (own.decay[:, :, None] * jnp.eye(own.decay.shape[-1]), steps.transition[:, 0]),
        (own.drift[:, :, None] * jnp.eye(own.drift.shape[-1]), steps.drift[:, 0]),
        (own.key, given.observation[:, 0]),
        (own.noise[:, :, None] * jnp.eye(own.noise.shape[-1]), given.noise[:, 0]),
    )
    return all(np.allclose(first, second, atol=TOLERANCE) for first, second in pairs)


def _reading(exact: ExactFilter, u: Mapping[str, Array]):
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
