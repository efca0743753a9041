"""The degree proof against a table of programs, NumPyro densities, and random programs."""

import functools
import inspect
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive, primitives

from inference import degree as degree_module
from inference import locations
from inference.degree import NOT_POLYNOMIAL, Degree, degrees


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


MATRIX = np.array([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.2]])
LATENT = np.array([0.4, -1.1, 0.7])


def bound(function, *latents):
    """The largest degree over the outputs, of a function of one latent vector by default."""
    results = degrees(lambda packed: function(*packed), latents or (LATENT,))
    return max(result.degree for result in jax.tree.leaves(results, is_leaf=is_degree))


def is_degree(node):
    return isinstance(node, Degree)


@jax.custom_jvp
def custom_jvp_identity(x):
    return x


custom_jvp_identity.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@jax.custom_vjp
def custom_vjp_identity(x):
    return x


custom_vjp_identity.defvjp(lambda x: (x, None), lambda _, cotangent: (2 * cotangent,))


def scan(step, start, inputs=None, length=4):
    return lax.scan(step, start, inputs, length if inputs is None else None)


def loop(times, body, start):
    """A fori_loop that stays a `while`: the number of iterations is not static."""
    return lax.while_loop(lambda c: c[0] < times, lambda c: (c[0] + 1, body(c[1])), (0, start))[1]


def through_a_mutable_array(x):
    cell = jax.new_ref(jnp.zeros(3))
    cell[...] = jnp.tanh(x)
    return cell[...]


def branch_writes_a_mutable_array(x):
    cell = jax.new_ref(jnp.zeros(3))
    lax.cond(x[0] > 0, lambda: operator.setitem(cell, 0, 1.0), lambda: None)
    return cell[...]


def printed(x):
    jax.debug.print("{}", x)
    return x


def called_back(x, callback):
    return callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def rounded_dot(x):
    x = x.astype(jnp.float64)
    return lax.dot_general(x, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def bfloat16_algorithm(x):
    algorithm = lax.DotAlgorithmPreset.BF16_BF16_F32
    return jnp.dot(jnp.asarray(MATRIX), x, precision=algorithm)


def tridiagonal(diagonal, x):
    return lax.linalg.tridiagonal_solve(jnp.ones(3), diagonal, jnp.ones(3), x[:, None])


def convolve(x, kernel):
    return lax.conv_general_dilated(x[None, None], kernel[None, None], (1,), "SAME")


def called_closed(x, function):
    return primitives.closed_call_p.bind(x, call_jaxpr=jax.make_jaxpr(function)(x))[0]


COUNTS = np.arange(3)
spoofed_negation = Primitive("neg")
spoofed_negation.def_abstract_eval(lambda x: x)

CASES = [
    # affine
    ("constant", lambda x: jnp.ones(3), 0),
    ("identity", lambda x: x, 1),
    ("zero times the latent is not simplified", lambda x: 0 * x, 1),
    ("matrix product plus constant", lambda x: MATRIX @ x + 1, 1),
    ("constant over nothing", lambda x: jnp.exp(jnp.ones(3)) + x, 1),
    ("division by a constant", lambda x: x / jnp.array([1.0, 2.0, 3.0]), 1),
    ("indexing with integers", lambda x: x[jnp.array([2, 0, 0])], 1),
    ("dynamic_slice at a constant", lambda x: lax.dynamic_slice(x, (1,), (2,)), 1),
    ("at[].set", lambda x: jnp.zeros(5).at[1].set(x[0]), 1),
    ("at[].add with duplicates", lambda x: x.at[jnp.array([1, 1])].add(x[:2]), 1),
    ("at[].subtract", lambda x: x.at[0].subtract(x[1]), 1),
    ("dynamic_update_slice", lambda x: lax.dynamic_update_slice(jnp.zeros(5), x, (1,)), 1),
    ("roll", lambda x: jnp.roll(x, 1), 1),
    ("concatenate", lambda x: jnp.concatenate([x, jnp.ones(2)]), 1),
    ("stack and tile", lambda x: jnp.tile(jnp.stack([x, x]), 2), 1),
    ("split", lambda x: jnp.split(x, 3)[1], 1),
    ("pad with the latent", lambda x: lax.pad(jnp.ones(3), x[0], [(1, 1, 0)]), 1),
    ("mean, cumsum, flip", lambda x: jnp.mean(jnp.cumsum(x)[::-1]), 1),
    ("diff", jnp.diff, 1),
    ("associative scan of add", lambda x: lax.associative_scan(jnp.add, x), 1),
    ("window sum", lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (1,), "VALID"), 1),
    ("vmap", jax.vmap(lambda a: a * 3), 1),
    ("jit", jax.jit(lambda x: x + 1), 1),
    ("checkpoint", jax.checkpoint(lambda x: x * 2), 1),
    ("closed call", lambda x: called_closed(x, lambda y: 3 * y), 1),
    ("closed call of tanh", lambda x: called_closed(x, jnp.tanh), 3),
    ("vmapped while", lambda x: jax.vmap(lambda a, n: loop(n, lambda c: 2 * c, a))(x, COUNTS), 1),
    (
        "vmapped cond",
        lambda x: jax.vmap(lambda a, n: lax.cond(n > 1, abs, jnp.negative, a))(x, COUNTS),
        3,
    ),
    ("checkpoint_name", lambda x: checkpoint_name(x, "x"), 1),
    ("optimization_barrier keeps each", lambda x: lax.optimization_barrier((x, 1.0))[0], 1),
    ("device_put", jax.device_put, 1),
    ("copy", lambda x: jnp.array(x, copy=True), 1),
    ("gradient of a square", jax.grad(lambda x: jnp.sum(x**2)), 1),
    ("widening", lambda x: x.astype(jnp.complex128), 1),
    ("complex parts", lambda x: jnp.conj((1 + 2j) * x).imag, 1),
    ("fft is linear", lambda x: jnp.fft.rfft(x), 1),
    ("triangular solve", lambda x: jax.scipy.linalg.solve_triangular(MATRIX, x), 1),
    ("linear solve", lambda x: jnp.linalg.solve(MATRIX, x), 1),
    ("Cholesky solve", lambda x: jax.scipy.linalg.cho_solve((MATRIX, True), x), 1),
    ("tridiagonal solve", lambda x: tridiagonal(jnp.full(3, 4.0), x), 1),
    ("tridiagonal matrix of latents", lambda x: tridiagonal(x, x), 3),
    ("convolution", lambda x: convolve(x, jnp.ones(2)), 1),
    ("x ** 1.0", lambda x: x**1.0, 1),
    ("scan: a * c + b", lambda x: scan(lambda c, u: (u * c + 1, c.sum()), x, jnp.arange(4.0)), 1),
    ("scan: latent in consts only", lambda x: scan(lambda c, _: (c + x[0], c), 0.0), 1),
    ("scan: latent in xs only", lambda x: scan(lambda c, u: (0.5 * c + u, c), 0.0, x), 1),
    ("scan of no steps", lambda x: scan(lambda c, _: (c, c), x, length=0), 1),
    ("fori_loop", lambda x: lax.fori_loop(0, 3, lambda i, c: c * 2, x), 1),
    ("while", lambda x: loop(jnp.array(3), lambda c: c * 2 + x, x), 1),
    ("cond on a constant", lambda x: lax.cond(jnp.array(1) > 0, lambda: x, lambda: 2 * x), 1),
    ("map", lambda x: lax.map(lambda a: 2 * a, x), 1),
    ("where on a constant", lambda x: jnp.where(jnp.arange(3) > 1, x, 0), 1),
    ("select of three on a constant", lambda x: lax.select_n(jnp.array(2), x, x, 2 * x), 1),
    ("random numbers times the latent", lambda x: jax.random.normal(jax.random.key(0)) * x, 1),
    ("constant custom derivative", lambda x: jax.nn.relu(jnp.ones(3)) + x, 1),
    ("print of a constant", lambda x: (jax.debug.print("{}", jnp.ones(2)), x)[1], 1),
    # guards that are constant on finite latents
    ("where(isfinite) picks true", lambda x: jnp.where(jnp.isfinite(x), x, jnp.tanh(x)), 1),
    ("where(isnan) picks false", lambda x: jnp.where(jnp.isnan(x), jnp.tanh(x), x), 1),
    ("where(isinf) picks false", lambda x: jnp.where(jnp.isinf(x), jnp.tanh(x), x), 1),
    ("where(~isnan) picks true", lambda x: jnp.where(~jnp.isnan(x), x, jnp.tanh(x)), 1),
    ("abs < inf", lambda x: jnp.where(abs(x) < jnp.inf, x, jnp.tanh(x)), 1),
    ("abs >= inf", lambda x: jnp.where(jnp.inf <= abs(x), jnp.tanh(x), x), 1),
    ("isnan or isinf", lambda x: jnp.where(jnp.isnan(x) | jnp.isinf(x), jnp.tanh(x), x), 1),
    ("all(isfinite)", lambda x: jnp.where(jnp.isfinite(2 * x).all(), x, jnp.tanh(x)), 1),
    ("any(isnan)", lambda x: jnp.where(jnp.isnan(x / 2).any(), jnp.tanh(x), x), 1),
    ("any of nothing", lambda x: jnp.where(~jnp.isnan(x[:0]).any(), jnp.tanh(x), x), 3),
    ("all of nothing", lambda x: jnp.where(jnp.isnan(x[:0]).all(), jnp.tanh(x), x), 3),
    ("false and anything", lambda x: jnp.where(jnp.isnan(x) & (x > 0), jnp.tanh(x), x), 1),
    ("nan_to_num", jnp.nan_to_num, 1),
    ("guard is constant yet unknown", lambda x: jnp.where(jnp.isfinite(x + jnp.inf), 1, x), 1),
    ("guard with an infinite constant", lambda x: jnp.where(jnp.isfinite(x + jnp.inf), x, x**3), 3),
    ("guard on 1/0", lambda x: jnp.where(jnp.isfinite(x / jnp.zeros(3)), x, jnp.tanh(x)), 3),
    ("isfinite as a number", lambda x: jnp.isfinite(x) * 1.0, 0),
    ("guard in a scan", lambda x: scan(lambda c, _: (jnp.where(c == c, c, c**3), c), x), 1),
    # quadratic
    ("sum of squares", lambda x: jnp.sum(x**2), 2),
    ("product of two entries", lambda x: x[0] * x[1], 2),
    ("Kronecker product", lambda x: jnp.kron(x, x), 2),
    ("dot of latents", lambda x: x @ MATRIX @ x, 2),
    ("square, 1 - x², x ** 2.0", lambda x: jnp.square(x) + x**2.0, 2),
    ("|z|² of a complex combination", lambda x: jnp.real(x * 1j * jnp.conj(x * 1j)), 2),
    ("scan accumulates squares", lambda x: scan(lambda c, u: (c + u**2, c), 0.0, x), 2),
    ("scan multiplies carry by xs", lambda x: scan(lambda c, u: (u, c * u), 1.0, x), 2),
    ("convolution of latents", lambda x: convolve(x, x), 2),
    (
        "cond branches of degree 1, 2",
        lambda x: lax.switch(jnp.array(0), [lambda: x, lambda: x**2]),
        2,
    ),
    # not polynomial of degree <= 2
    *[
        (function.__name__, function, 3)
        for function in (
            *(jnp.tanh, jnp.abs, jnp.sign, jnp.max, jnp.min, jnp.sort, jnp.prod, jnp.cumprod),
            *(jnp.floor, jnp.round, jnp.exp, jnp.sqrt, jnp.argmax, jnp.median, jnp.linalg.norm),
            *(lax.cummax, lax.cumlogsumexp, jax.nn.relu, jax.nn.silu, jax.nn.logsumexp, jnp.sinc),
            *(lax.stop_gradient, custom_jvp_identity, custom_vjp_identity, rounded_dot),
            *(through_a_mutable_array, branch_writes_a_mutable_array, printed, bfloat16_algorithm),
        )
    ],
    ("clip to infinity", lambda x: jnp.clip(x, -jnp.inf, jnp.inf), 3),
    ("clamp", lambda x: lax.clamp(0.0, x, 1.0), 3),
    ("1 / x", lambda x: 1 / x, 3),
    ("x / (1 + x²)", lambda x: x / (1 + jnp.sum(x**2)), 3),
    ("x * x / x", lambda x: x * x / x, 3),
    ("log exp", lambda x: jnp.log(jnp.exp(x)), 3),
    ("cube", lambda x: x**3, 3),
    ("product of three", lambda x: x[0] * x[1] * x[2], 3),
    ("x ** 0.5", lambda x: x**0.5, 3),
    ("x ** -1", lambda x: x**-1, 3),
    ("2 ** x", lambda x: 2.0**x, 3),
    ("square of a square", lambda x: jnp.square(jnp.square(x)), 3),
    ("x ** 0 is one", lambda x: lax.integer_pow(x, 0), 0),
    ("where on the latent", lambda x: jnp.where(x > 0, x, 0), 3),
    ("where on x == 1", lambda x: jnp.where(x == 1.0, x, 0), 3),
    ("where on isfinite(1 / x)", lambda x: jnp.where(jnp.isfinite(1 / x), x, 0), 3),
    ("where on x == x rolled", lambda x: jnp.where(x == jnp.roll(x, 1), x, 0), 3),
    ("boolean times latent", lambda x: (x > 0) * x, 3),
    ("conversion to boolean", lambda x: x.astype(bool) * 1.0, 3),
    ("conversion to integer", lambda x: x.astype(int), 3),
    ("conversion to bfloat16", lambda x: x.astype(jnp.bfloat16).astype(float), 3),
    ("conversion to float32", lambda x: x.astype(jnp.float32), 3),
    ("reduce_precision", lambda x: lax.reduce_precision(x, 8, 7), 3),
    ("bit cast", lambda x: lax.bitcast_convert_type(x, jnp.int64), 3),
    ("nextafter", lambda x: jnp.nextafter(x, 2.0), 3),
    ("remainder", lambda x: x % 1.0, 3),
    ("abs of a complex combination", lambda x: jnp.abs(x * 1j), 3),
    ("angle", lambda x: jnp.angle(x + 1j), 3),
    ("index by the latent", lambda x: jnp.arange(3.0)[jnp.argmax(x)], 3),
    ("slice at the latent", lambda x: lax.dynamic_slice(x, (jnp.argmax(x),), (1,)), 3),
    ("scatter at the latent", lambda x: x.at[jnp.argmax(x)].set(0.0), 3),
    ("at[].multiply", lambda x: x.at[0].multiply(x[1]), 3),
    ("at[].max", lambda x: x.at[0].max(0.0), 3),
    ("at[].apply", lambda x: x.at[1].apply(jnp.sin), 3),
    ("general reduce", lambda x: lax.reduce(x, 0.0, lambda a, b: a + b**2, (0,)), 3),
    ("sorting constants by the latent", lambda x: lax.sort_key_val(x, jnp.arange(3.0))[1], 3),
    ("top_k", lambda x: lax.top_k(x, 2)[0], 3),
    ("matrix of a solve", lambda x: jnp.linalg.solve(jnp.diag(x), x), 3),
    (
        "matrix of a triangular solve",
        lambda x: jax.scipy.linalg.solve_triangular(jnp.diag(x), x),
        3,
    ),
    ("inverse", lambda x: jnp.linalg.inv(jnp.diag(x)), 3),
    ("Cholesky", lambda x: jnp.linalg.cholesky(jnp.outer(x, x)), 3),
    ("eigenvalues", lambda x: jnp.linalg.eigh(jnp.outer(x, x))[0], 3),
    ("determinant", lambda x: jnp.linalg.slogdet(jnp.diag(x))[1], 3),
    ("conjugate gradients", lambda x: jax.scipy.sparse.linalg.cg(lambda y: 2 * y, x)[0], 3),
    (
        "solve that squares",
        lambda x: lax.custom_linear_solve(lambda y: 2 * y, x, lambda _, b: b**2),
        3,
    ),
    ("scan squares its carry", lambda x: scan(lambda c, _: (c * c, c.sum()), x), 3),
    ("scan squares slowly", lambda x: scan(lambda c, _: ((c[1], c[0] ** 2), 0), (x, x * 0)), 3),
    ("scan multiplies carry by latent", lambda x: scan(lambda c, u: (c * u, c), 1.0, x), 3),
    ("scan raises xs later", lambda x: scan(lambda c, u: (u, c * c * u), 1.0, x), 3),
    ("while squares", lambda x: loop(jnp.array(3), lambda c: c * c, x), 3),
    ("while length depends on the latent", lambda x: loop(x[0], lambda c: c + 1, 0.0), 3),
    ("while until small", lambda x: lax.while_loop(lambda c: c[0] > 1, lambda c: c / 2, x), 3),
    ("cond on the latent", lambda x: lax.cond(x[0] > 0, lambda: x, lambda: 2 * x), 3),
    ("switch on the latent", lambda x: lax.switch(jnp.argmax(x), [lambda: 1.0, lambda: 2.0]), 3),
    ("cond branch with tanh", lambda x: lax.cond(jnp.array(True), jnp.tanh, lambda y: y, x), 3),
    ("nested jit of tanh", jax.jit(lambda x: jax.jit(jnp.tanh)(x)), 3),
    ("checkpoint of tanh", jax.checkpoint(jnp.tanh), 3),
    ("pure_callback", lambda x: called_back(x, jax.pure_callback), 3),
    ("io_callback", lambda x: called_back(x, jax.experimental.io_callback), 3),
    ("printed inside jit", jax.jit(printed), 3),
    ("seed from the latent", lambda x: jax.random.normal(jax.random.key(x[0].astype(int))), 3),
    ("gamma shape", lambda x: jax.random.gamma(jax.random.key(0), x[0]), 3),
    ("a stranger called neg", spoofed_negation.bind, 3),
    ("three bad branches of select", lambda x: lax.select_n(jnp.array(2), x, x, x**3), 3),
    (
        "linear_call",
        lambda x: jax.custom_derivatives.linear_call(lambda _, a: 2 * a, lambda _, a: a, (), x),
        3,
    ),
]


@pytest.mark.parametrize(
    ("function", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_each_program_gets_its_degree(function, expected):
    assert bound(function) == expected


def test_every_table_entry_is_a_primitive_of_jax():
    names = " ".join(degree_module.PRIMITIVES.values()).split()
    assert len(names) == len(set(names)) == len(degree_module._RULES)
    assert set(degree_module.MUST_BE_CONSTANT) <= set(names)


SCALES = np.array([0.5, 1.0, 2.0])
SQUARE = np.linalg.cholesky(MATRIX)
AFFINE = dist.transforms.AffineTransform
DENSITIES = [
    ("Normal", lambda: dist.Normal(0.5, 2.0), 2),
    ("Normal with array scale", lambda: dist.Normal(LATENT, SCALES), 2),
    ("expanded, independent", lambda: dist.Normal(0.5, 2.0).expand([3]).to_event(1), 2),
    ("MultivariateNormal, covariance", lambda: dist.MultivariateNormal(LATENT, MATRIX), 2),
    ("MultivariateNormal, factor", lambda: dist.MultivariateNormal(LATENT, scale_tril=SQUARE), 2),
    (
        "MultivariateNormal, precision",
        lambda: dist.MultivariateNormal(0.0, precision_matrix=MATRIX),
        2,
    ),
    ("LowRank", lambda: dist.LowRankMultivariateNormal(LATENT, MATRIX[:, :1], SCALES), 2),
    ("random walk", lambda: dist.GaussianRandomWalk(0.7, 3), 2),
    ("affine", lambda: dist.TransformedDistribution(dist.Normal(0, 1), AFFINE(LATENT, SCALES)), 2),
    (
        "affine of event",
        lambda: dist.TransformedDistribution(
            dist.Normal(0, SCALES).to_event(1), AFFINE(1.0, SCALES)
        ),
        2,
    ),
    ("StudentT", lambda: dist.StudentT(3.0), 3),
    ("Laplace", lambda: dist.Laplace(), 3),
    ("Cauchy", lambda: dist.Cauchy(), 3),
    ("Logistic", lambda: dist.Logistic(), 3),
    ("Gumbel", lambda: dist.Gumbel(), 3),
    (
        "mixture",
        lambda: dist.MixtureSameFamily(
            dist.Categorical(np.ones(2) / 2), dist.Normal(0.0, SCALES[:2])
        ),
        3,
    ),
    ("LogNormal", lambda: dist.LogNormal(), 3),
]


@pytest.mark.parametrize(
    ("distribution", "expected"), [d[1:] for d in DENSITIES], ids=[d[0] for d in DENSITIES]
)
def test_densities_are_quadratic_exactly_for_gaussians(distribution, expected):
    assert bound(distribution().log_prob) == expected


def test_matrix_normal_is_quadratic():
    density = dist.MatrixNormal(np.zeros((2, 3)), SQUARE[:2, :2], SQUARE).log_prob
    assert bound(density, np.ones((2, 3))) == 2


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (lambda state, value: dist.Normal(2 * state + 1, 0.5).log_prob(value), 2),
        (lambda state, value: dist.MultivariateNormal(MATRIX @ state, MATRIX).log_prob(value), 2),
        (lambda state, value: dist.Normal(1.0 + MATRIX @ state + 0.3 * value, 2).log_prob(1.0), 2),
        (lambda state, value: dist.Normal(0.0, jnp.exp(state)).log_prob(value), 3),
        (lambda state, value: dist.Normal(jnp.tanh(state), 1.0).log_prob(value), 3),
        (lambda state, value: dist.Normal(state * value, 1.0).log_prob(0.0), 3),
    ],
)
def test_state_and_value_are_jointly_quadratic_when_the_mean_is_affine(density, expected):
    assert bound(density, LATENT, LATENT) == expected


def test_half_normal_is_never_called_less_than_quadratic():
    assert bound(dist.HalfNormal(2.0).log_prob) >= 2


def test_output_structure_is_kept():
    result = degrees(lambda x: {"a": (x["m"], 1.0), "b": None}, {"m": LATENT})
    assert result == {"a": (Degree(1), Degree(0)), "b": None}


def test_only_latents_count():
    result = degrees(
        lambda x, c: (jnp.tanh(c["scale"]) * x, c["key"]),
        LATENT,
        {"scale": SCALES, "key": jax.random.key(0)},
    )
    assert [d.degree for d in result] == [1, 0]


def test_shapes_are_enough():
    shape = jax.ShapeDtypeStruct((3,), jnp.float64)
    assert degrees(lambda x, c: c * x, shape, shape).degree == 1


def test_the_proof_runs_inside_a_trace():
    proven = []
    jax.jit(lambda c: proven.append(degrees(lambda x, c: c * x, LATENT, c)) or c)(SCALES)
    assert proven[0].degree == 1


@pytest.mark.parametrize("latent", [3, np.arange(3), np.array(True)])
def test_integer_and_boolean_latents_are_not_coordinates(latent):
    result = degrees(lambda x: x + 1.5, latent)
    assert result.degree == NOT_POLYNOMIAL
    assert "floating-point" in result.reason


@pytest.mark.parametrize(
    ("function", "finite"),
    [
        (jnp.isfinite, True),
        (lambda x: ~jnp.isnan(x) & (x < jnp.inf), True),
        (lambda x: jnp.isfinite(MATRIX @ x + 1).all(), True),
        (jnp.isnan, False),
        (lambda x: x > 0, False),
        (lambda x: jnp.isfinite(1 / x), False),
        (lambda x: jnp.isfinite(x + jnp.inf), False),
        (lambda x: x, False),
    ],
)
def test_finite_marks_booleans_that_are_true_on_finite_latents(function, finite):
    assert degrees(function, LATENT).finite is finite


def test_infinite_constants_are_not_taken_for_finite():
    def guarded(x, c):
        return jnp.where(jnp.isfinite(x + c), x, jnp.tanh(x))

    assert degrees(guarded, LATENT, np.zeros(3)).degree == 1
    assert degrees(guarded, LATENT, np.full(3, np.inf)).degree == 3
    assert degrees(guarded, LATENT, jax.ShapeDtypeStruct((3,), jnp.float64)).degree == 3


# --- reasons and locations -------------------------------------------------------------------


def divides(x):
    doubled = 2 * x
    return 1 / doubled


def chooses(x):
    return jnp.where(x > 0, x, 0) + 1


def chooses_again(x):
    ordered = jnp.sort(x)
    return jnp.where(x == x, x, ordered)


def line_of(function, text):
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize(
    ("function", "text", "reason"),
    [
        (divides, "1 / doubled", "division by a quantity that depends on the latent"),
        (chooses, "jnp.where", "comparison"),
        (jax.jit(divides), "1 / doubled", "division"),
    ],
)
def test_the_offending_line_is_named(function, text, reason):
    result = degrees(function, LATENT)
    source = inspect.unwrap(function)
    expected = f"{__file__}:{line_of(source, text)} ({source.__name__})"
    assert (result.degree, result.location) == (NOT_POLYNOMIAL, expected)
    assert reason in result.reason


def test_library_functions_traced_earlier_elsewhere_name_their_present_caller():
    def first(x):
        return jnp.nanmax(x)

    def second(x):
        return jnp.nanmax(x)

    places = [degrees(function, LATENT).location for function in (first, second)]
    assert [place.rpartition(" ")[2] for place in places] == ["(first)", "(second)"]


def test_the_first_offence_is_reported_and_kept_through_loops():
    result = degrees(lambda x: scan(lambda c, _: (c * c, jnp.tanh(c)), x)[0], LATENT)
    assert "product" in result.reason
    assert __file__ in result.location


def test_frames_of_libraries_alone_give_no_location():
    assert locations.of_frames([(jax.__file__, 1, "f")]) == locations.of_frames([]) == ""


# --- random programs -------------------------------------------------------------------------

WIDTH = 3
AFFINE_STEPS = {
    "scale": lambda x, y, c: c * x,
    "shift": lambda x, y, c: x + c,
    "add": lambda x, y, c: x + y,
    "subtract": lambda x, y, c: x - y,
    "mix": lambda x, y, c: MATRIX @ x,
    "divide": lambda x, y, c: x / (1 + c**2),
    "roll": lambda x, y, c: jnp.roll(x, 1),
    "reverse": lambda x, y, c: x[::-1],
    "gather": lambda x, y, c: x[jnp.array([2, 0, 0])],
    "set": lambda x, y, c: x.at[1].set(y[0]),
    "sum": lambda x, y, c: jnp.sum(x) + y,
    "cumsum": lambda x, y, c: jnp.cumsum(x),
    "where": lambda x, y, c: jnp.where(jnp.arange(WIDTH) > 0, x, y),
    "guard": lambda x, y, c: jnp.where(jnp.isfinite(x), x, -jnp.inf),
    "guard not": lambda x, y, c: jnp.where(jnp.isnan(x), jnp.tanh(y), x),
    "scan": lambda x, y, c: scan(lambda a, u: (0.5 * a + u, a), c[0], x)[1],
    "scan vector": lambda x, y, c: scan(lambda a, _: (c * a + y, a[0]), x)[0],
    "loop": lambda x, y, c: loop(jnp.array(2), lambda a: a + y, x),
    "solve": lambda x, y, c: jnp.linalg.solve(MATRIX, x),
    "cond": lambda x, y, c: lax.cond(c[0] > 0, lambda: x, lambda: y),
    "complex": lambda x, y, c: jnp.imag(1j * x + y),
    "jit": lambda x, y, c: jax.jit(jnp.add)(x, y),
}
OTHER_STEPS = {
    "product": lambda x, y, c: x * y,
    "square": lambda x, y, c: x**2,
    "dot": lambda x, y, c: (x @ y) * jnp.ones(WIDTH),
    "kept square": lambda x, y, c: jnp.square(x) + y,
    "scan product": lambda x, y, c: scan(lambda a, u: (u, a * u), c[0], x)[1],
    "scan power": lambda x, y, c: scan(lambda a, u: (a * u, a * u), 1.0, x)[1],
    "scan square": lambda x, y, c: scan(lambda a, _: (0.1 * a * a, a[0]), x, length=2)[0],
    "tanh": lambda x, y, c: jnp.tanh(x),
    "abs": lambda x, y, c: jnp.abs(x),
    "relu": lambda x, y, c: jnp.where(x > 0, x, 0),
    "choose": lambda x, y, c: jnp.where(x > y, x, y),
    "ratio": lambda x, y, c: x / (1 + y**2),
    "max": lambda x, y, c: jnp.maximum(x, y),
    "sort": lambda x, y, c: jnp.sort(x),
    "round": lambda x, y, c: jnp.round(x),
    "index": lambda x, y, c: jnp.roll(x, jnp.argmax(y)),
    "multiply at": lambda x, y, c: x.at[jnp.array([0, 0])].multiply(y[:2]),
    "apply at": lambda x, y, c: x.at[0].apply(jnp.sin),
    "single": lambda x, y, c: x.astype(jnp.bfloat16).astype(x.dtype),
    "count": lambda x, y, c: loop(jnp.sum(jnp.abs(x)), lambda a: a + y, y),
    "branch": lambda x, y, c: lax.cond(x[0] > 0, lambda: x, lambda: y),
    "finite ratio": lambda x, y, c: jnp.where(jnp.isfinite(1 / jnp.floor(x)), x, y),
    "integer": lambda x, y, c: (x > 0) * y,
}
STEPS = AFFINE_STEPS | OTHER_STEPS


def program(choices):
    """Compose steps (name, first operand, second operand); operand i is the i-th result so far."""

    def run(latent):
        results, constant = [latent], jnp.array([0.3, -0.8, 1.1])
        for name, first, second in choices:
            x, y = results[first % len(results)], results[second % len(results)]
            results.append(STEPS[name](x, y, constant))
        return results[-1]

    return run


def steps(names):
    return st.lists(
        st.tuples(st.sampled_from(sorted(names)), st.integers(0, 5), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    )


def assert_polynomial_on_lines(function, degree, rng):
    """The (degree + 1)-th difference along random lines vanishes, to 1e-9 of the values' size.

    A polynomial of degree d has Δ^(d+1) = 0 exactly; in float64 the alternating sum of d + 2
    values (binomial weights at most 3) carries rounding of about 1e-15 times the largest value
    met on the way, for which 1e-9 of the largest entry leaves room after five steps.
    """
    for scale in (1e-2, 1.0, 30.0):
        start, slope = scale * rng.normal(size=(2, 8, WIDTH))
        points = np.stack([start + t * slope for t in range(degree + 2)])
        values = np.asarray(jax.vmap(jax.vmap(function))(points))
        size = max(1.0, scale) ** max(degree, 1) + np.max(np.abs(values))
        np.testing.assert_allclose(np.diff(values, degree + 1, axis=0), 0.0, atol=1e-9 * size)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(steps(STEPS), st.integers(0, 2**20))
@example([("index", 0, 0)], 0)
def test_no_claim_contradicts_finite_differences(choices, seed):
    claimed = bound(program(choices))
    assume(claimed < NOT_POLYNOMIAL)
    assert_polynomial_on_lines(program(choices), claimed, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(OTHER_STEPS, ["shift", "product"]))
)
def test_no_claim_about_two_steps_contradicts_finite_differences(first, second):
    function = program([(first, 0, 0), (second, 1, 0)])
    claimed = bound(function)
    if claimed < NOT_POLYNOMIAL:
        assert_polynomial_on_lines(function, claimed, np.random.default_rng(0))


def test_finite_differences_see_what_is_not_polynomial():
    """The numerical oracle itself refuses each program that a blind claim would pass."""
    blind = ["tanh", "abs", "relu", "ratio", "sort", "round", "apply at", "branch", "scan power"]
    for name in blind:
        function = program([("shift", 0, 0), ("roll", 1, 0), (name, 1, 2)])
        with pytest.raises(AssertionError):
            assert_polynomial_on_lines(function, 2, np.random.default_rng(0))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(steps(AFFINE_STEPS))
def test_programs_of_affine_steps_are_proven_affine(choices):
    assert bound(program(choices)) <= 1


@pytest.mark.parametrize("name", AFFINE_STEPS)
def test_each_affine_step_is_proven_affine_and_keeps_a_square_quadratic(name):
    assert bound(functools.partial(program([(name, 0, 0)]))) == 1
    assert bound(program([("square", 0, 0), (name, 1, 0)])) <= 2
