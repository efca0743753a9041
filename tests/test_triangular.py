"""Triangular inverses and Cholesky factors against NumPy, and their gradients against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.triangular import cholesky_and_inverse, triangular_inverse

WIDTHS = (16, 32, 64)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def positive(width: int) -> np.ndarray:
    factor = np.random.default_rng(width).normal(size=(width, width))
    return factor @ factor.T / width + 0.1 * np.eye(width)


def cotangent(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(width, width))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("width", WIDTHS)
def test_triangular_inverse_is_the_inverse(width):
    lower = np.linalg.cholesky(positive(width))
    assert_close(triangular_inverse(jnp.asarray(lower)), np.linalg.inv(lower))


@pytest.mark.parametrize("width", WIDTHS)
def test_triangular_inverse_has_the_gradient_of_a_solve(width):
    lower, weights = jnp.asarray(np.linalg.cholesky(positive(width))), cotangent(width, 1)

    def solved(lower):
        return jax.scipy.linalg.solve_triangular(lower, jnp.eye(width), lower=True)

    found, expected = (
        jax.jit(jax.grad(lambda lower, form=form: jnp.sum(weights * form(lower))))(lower)
        for form in (triangular_inverse, solved)
    )
    assert_close(found, np.tril(expected))


@pytest.mark.parametrize("width", WIDTHS)
def test_cholesky_and_inverse_are_numpys(width):
    root, inverse = cholesky_and_inverse(jnp.asarray(positive(width)))
    expected = np.linalg.cholesky(positive(width))
    assert_close(root, expected)
    assert_close(inverse, np.linalg.inv(expected))


@pytest.mark.parametrize("width", WIDTHS)
def test_cholesky_and_inverse_have_the_gradient_of_jaxs_own(width):
    matrix = jnp.asarray(positive(width))
    # The factor is lower-triangular; what is above its diagonal is asked of no one.
    of_root, of_inverse = np.tril(cotangent(width, 1)), np.tril(cotangent(width, 2))

    def composed(matrix):
        root = jnp.linalg.cholesky(matrix)
        return root, jax.scipy.linalg.solve_triangular(root, jnp.eye(width), lower=True)

    def loss(form, matrix):
        root, inverse = form((matrix + matrix.T) / 2)
        return jnp.sum(of_root * root) + jnp.sum(of_inverse * inverse)

    found, expected = (
        jax.grad(loss, argnums=1)(form, matrix) for form in (cholesky_and_inverse, composed)
    )
    assert_close(found, expected)


def test_float32_stands_repeated_keys():
    """I + N with every entry of N equal to .9, where forming powers of N overflows its digits."""
    lower = np.tril(np.full((64, 64), 0.9), -1) + np.eye(64)
    found = triangular_inverse(jnp.asarray(lower, "float32"))
    np.testing.assert_allclose(found, np.linalg.inv(lower), rtol=0, atol=2e-5)
