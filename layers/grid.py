r"""Coefficients of a certified memory whose entries are filtered one by one, on its own grid.

Every entry has numbers of its own,

$$ s' = a\,s + f + w,\quad w \sim N(0, q),\qquad y = h\,s' + N(0, r)\ \text{or}\
   z = w\text{'s measurement},\ \mathrm{var}(z) = r,\ \mathrm{cov}(w, z) = c $$

**What is added.** Where only the change is seen, the mean moves by f + (c/r)(z − z̄) whatever is
held. Where that is an outer product v kᵀ, keys alone decay and drift, and nothing else is needed:
v is the input `value`, and k the first row of what `value` = 1 writes. The part of q that z leaves
unexplained is that of noise q(rq − c²)/c² in `Additive`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from inference.exact_filter import ExactFilter
from inference.linear_gaussian import Step

from .coefficients import Coefficients, first_output, reading, reads_otherwise, same

Grid = Float[Array, "value key"]


def rows_of(exact: ExactFilter) -> np.ndarray:
    """Places of the memory's rows in the flattened memory."""
    shape = jax.tree.leaves(exact.proof.memory)[0].shape
    return np.arange(exact.partition.states.size).reshape(shape)


def prior_variances(exact: ExactFilter) -> Grid:
    return _on_grid(exact, exact.initial().covariance)


def _on_grid(exact: ExactFilter, numbers: Float[Array, "block some one"]) -> Grid:
    """One number for each block, or for each of its rows, where its entries are."""
    states = exact.partition.states
    flat = jnp.zeros(states.size, numbers.dtype)
    return flat.at[states].set(numbers).reshape(rows_of(exact).shape)


class Cells(eqx.Module):
    """One token's numbers of entries that are seen; with a leading axis, a sequence's."""

    decay: Float[Array, "*time value key"]
    drift: Float[Array, "*time value key"]
    key: Float[Array, "*time value key"]
    noise: Float[Array, "*time value key"]
    value: Float[Array, "*time value key"]
    query: Float[Array, "*time key"]
    output_noise: Float[Array, "*time"]


def cells(exact: ExactFilter, u: Mapping[str, Array]) -> Cells:
    """One token's numbers; `u` may be traced."""
    step, observed = exact.coefficients(u), exact.observed(u).observation
    given = step.observation
    assert given is not None
    assert observed is not None
    query, noise = first_output(exact, u, rows_of(exact)[0])
    return Cells(
        _on_grid(exact, step.transition),
        _on_grid(exact, step.drift),
        _on_grid(exact, given.observation),
        _on_grid(exact, given.noise),
        _on_grid(exact, observed),
        query,
        noise,
    )


def increments(exact: ExactFilter, u: Mapping[str, Array]) -> Coefficients:
    """One token's coefficients where what is added is an outer product; `u` may be traced."""
    step = exact.coefficients(u)
    given, seen = step.evidence, exact.observed(u).evidence
    assert given is not None
    assert seen is not None
    unit = {**u, "value": jnp.ones_like(u["value"])}
    query, output_noise = first_output(exact, u, rows_of(exact)[0])
    spread = _on_grid(exact, given.noise)
    surprise = _on_grid(exact, seen - given.shift) ** 2 / spread + jnp.log(2 * jnp.pi * spread)
    return Coefficients(
        _on_grid(exact, step.transition)[0],
        _on_grid(exact, step.drift)[0],
        _written(exact, exact.coefficients(unit), unit)[:1],
        _unexplained(exact, step)[0, :1],
        u["value"][None],
        query,
        output_noise,
        -jnp.sum(surprise) / 2,
    )


def _written(exact: ExactFilter, step: Step, u: Mapping[str, Array]) -> Grid:
    """What the evidence moves the mean by."""
    given, seen = step.evidence, exact.observed(u).evidence
    assert given is not None
    assert seen is not None
    gain = given.cross / given.noise
    return _on_grid(exact, step.shift + gain * (seen - given.shift))


def _unexplained(exact: ExactFilter, step: Step) -> Grid:
    """The noise of an observation of the change that would leave it as uncertain."""
    given = step.evidence
    assert given is not None
    explained = given.cross**2
    left = step.drift * (given.noise * step.drift - explained)
    noise = jnp.where(explained > 0, left / jnp.where(explained > 0, explained, 1), 1)
    return _on_grid(exact, noise)


def not_on_grid(exact: ExactFilter) -> str:
    """Why entries are not filtered one by one; "" where they are."""
    structure, memory = exact.structure, jax.tree.leaves(exact.proof.memory)
    if structure.kind not in ("scalar", "diagonal"):
        return structure.why_paths
    if len(memory) != 1 or len(memory[0].shape) != 2:
        return "the memory is not one matrix"
    return ""


def not_cells(exact: ExactFilter) -> str:
    """Why `cells` do not describe the filter; "" where they do."""
    structure = exact.structure
    reason = not_on_grid(exact)
    if reason:
        return reason
    if structure.evidence or structure.observations != 1:
        return "an entry is not seen by one observation"
    if structure.shifted:
        return "means are shifted"
    (own, read), mean, _ = _at_examples(exact, lambda u: (cells(exact, u), reading(exact, u)))
    if np.any(np.abs(mean) > 0):
        return "the prior's mean is not zero"
    return reads_otherwise(read, own, rows_of(exact))


def not_increments(exact: ExactFilter) -> str:
    """Why `increments` do not describe a filter whose writes add up; "" where they do."""
    reason = not_on_grid(exact)
    if reason:
        return reason
    values = exact.examples.get("value")
    if values is None or values.shape[1:] != rows_of(exact).shape[:1]:
        return "no input `value` has an entry for each row"

    def at(u):
        step = exact.coefficients(u)
        grids = (_on_grid(exact, part) for part in (step.transition, step.drift))
        found = (*grids, _unexplained(exact, step), _written(exact, step, u))
        return increments(exact, u), found, reading(exact, u)

    (own, (decay, drift, noise, written), read), mean, prior = _at_examples(exact, at)
    if np.any(np.abs(mean) > 0):
        return "the prior's mean is not zero"
    if not all(same(part, part[:, :1] + 0 * part) for part in (decay, drift, prior[None])):
        return "rows decay, drift or start in ways of their own"
    if not same(noise, noise[:, :1, :1] + 0 * noise):
        return "entries are seen with noises of their own"
    if not same(written, own.value[:, 0, :, None] * own.key[:, 0, None]):
        return "what is added is no outer product of `value` and a key"
    return reads_otherwise(read, own, rows_of(exact))


def _at_examples(exact: ExactFilter, at: Callable[[Mapping[str, Array]], Any]):
    """What `at` finds at the filter's examples; the prior's mean, and its variances."""

    @jax.jit
    def find(examples):
        return jax.vmap(at)(examples), exact.initial().mean, prior_variances(exact)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, find(dict(exact.examples)))
