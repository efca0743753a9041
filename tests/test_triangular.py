"""Triangular inverses and Cholesky factors against NumPy, and their gradients against JAX's own."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.triangular import cholesky_and_inverse, triangular_inverse

WIDTHS = (16, 64)


def positive(width: int) -> np.ndarray:
    factor = np.random.default_rng(width).normal(size=(width, width))
    return factor @ factor.T / width + 0.1 * np.eye(width)


def cotangent(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(width, width))


def solved(lower):
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower)), lower=True)


def composed(matrix):
    root = jnp.linalg.cholesky(matrix)
    return root, solved(root)


def corrected(matrix):
    return cholesky_and_inverse(matrix, lambda inverse: inverse @ matrix @ inverse.T)


@cache
def computed(width: int) -> dict[str, np.ndarray]:
    """Both functions and their gradients, and JAX's own gradients."""
    weights = cotangent(width, 1)
    # The factor is lower-triangular; what is above its diagonal is asked of no one.
    of_root, of_inverse = np.tril(weights), np.tril(cotangent(width, 2))

    def of_factor(form, matrix):
        root, inverse = form((matrix + matrix.T) / 2)
        return jnp.sum(of_root * root) + jnp.sum(of_inverse * inverse)

    def of_inverses(form, lower):
        return jnp.sum(weights * form(lower))

    def everything(matrix):
        lower = jnp.linalg.cholesky(matrix)
        found = {"inverse": triangular_inverse(lower), "both": corrected(matrix)}
        for form in (triangular_inverse, solved):
            found[form.__name__] = jax.grad(of_inverses, argnums=1)(form, lower)
        for form in (corrected, composed):
            found[form.__name__] = jax.grad(of_factor, argnums=1)(form, matrix)
        return found

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(everything)(jnp.asarray(positive(width))))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("width", WIDTHS)
def test_triangular_inverse_is_the_inverse(width):
    lower = np.linalg.cholesky(positive(width))
    assert_close(computed(width)["inverse"], np.linalg.inv(lower))


@pytest.mark.parametrize("width", WIDTHS)
def test_triangular_inverse_has_the_gradient_of_a_solve(width):
    found = computed(width)
    assert_close(found["triangular_inverse"], np.tril(found["solved"]))


@pytest.mark.parametrize("width", WIDTHS)
def test_cholesky_and_inverse_are_numpys(width):
    root, inverse = computed(width)["both"]
    expected = np.linalg.cholesky(positive(width))
    assert_close(root, expected)
    assert_close(inverse, np.linalg.inv(expected))


@pytest.mark.parametrize("width", WIDTHS)
def test_cholesky_and_inverse_have_the_gradient_of_jaxs_own(width):
    found = computed(width)
    assert_close(found["corrected"], found["composed"])


def test_float32_stands_repeated_keys():
    """I + N with every entry of N equal to .9, where forming powers of N overflows its digits."""
    lower = np.tril(np.full((64, 64), 0.9), -1) + np.eye(64)
    found = jax.jit(triangular_inverse)(jnp.asarray(lower, "float32"))
    np.testing.assert_allclose(found, np.linalg.inv(lower), rtol=0, atol=2e-5)


def test_a_factor_of_keys_keeps_the_digits_that_their_products_lose():
    """G = K Kᵀ + 1e-6 I in float32: indefinite as rounded, yet its factor is found."""
    rng = np.random.default_rng(0)
    key = (1 + 0.1 * rng.normal(size=(64, 16))).astype("float32")
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    rounded = key @ key.T + 1e-6 * np.eye(64, dtype="float32")
    assert np.linalg.eigvalsh(rounded.astype(float))[0] < 1e-6 / 2
    exact = np.linalg.cholesky(key.astype(float) @ key.T.astype(float) + 1e-6 * np.eye(64))

    @jax.jit
    def factor(joint, key):
        def congruence(inverse):
            white = inverse @ key
            return white @ white.T + 1e-6 * inverse @ inverse.T

        return cholesky_and_inverse(joint, congruence)

    root, inverse = factor(rounded, key)
    np.testing.assert_allclose(np.diagonal(root), np.diagonal(exact), rtol=2e-3)
    np.testing.assert_allclose(inverse @ exact, np.eye(64), rtol=0, atol=2e-2)
