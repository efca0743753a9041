r"""Coefficients with every choice that the inputs make left open.

A coefficient that vanishes, or equals another, at a few random inputs does so at every input if
it is analytic in them, on a connected domain: that is the identity theorem. `jnp.where(u > 9, a,
b)` is not analytic: inputs at which it takes one branch say nothing about the other.

So a function of the inputs is evaluated here with everything that is not analytic set free. The
result of such a primitive is replaced by numbers that have nothing to do with it; what holds for
any numbers in its place holds for those it gives. In detail, for what depends on the inputs:

* a primitive that is analytic, or moves entries about, is evaluated as it is;
* a function of corresponding entries (a comparison, `max`, `sqrt`, `abs`, rounding) becomes some
  other function of them, the same one for all entries;
* a choice between cases (`select_n`, `cond`) becomes a mixture $(1 - p) a + p b$, which is each
  of the cases for p = 0 and 1, of unknown p;
* integers and booleans become real numbers;
* anything else (an index, a sort, a loop of unknown length) gives unknown numbers.

Square roots and logarithms count as not analytic, as $\sqrt{u^2}$ is not. A Cholesky factor counts
as analytic. Solves and inverses of the library are analytic as a whole, though they pivot.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array, Float

from . import locations
from .degree import MUST_BE_CONSTANT, PRIMITIVES

DRAW = 8
"""How many standard normal numbers decide all that is unknown."""
Draw = Float[Array, "8"]
_LONGEST_LOOP = 32

_NAMES = {
    "polynomial": "add add_any sub mul neg reduce_sum cumsum integer_pow square dot_general",
    "entire": "exp exp2 expm1 sin cos sinh cosh tanh logistic erf erfc asinh atan tan"
    " one_minus_square reduce_prod cumprod cholesky stop_gradient",
    "entry by entry": "sqrt rsqrt cbrt log log1p pow abs sign floor ceil round max min clamp eq ne"
    " lt le gt ge and or xor not is_finite rem nextafter atan2 asin acos acosh atanh erf_inv lgamma"
    " digamma div square integer_pow shift_left shift_right_logical shift_right_arithmetic",
}
_MOVES = {
    *PRIMITIVES["move"].split(),
    *PRIMITIVES["each"].split(),
    *_NAMES["polynomial"].split(),
}
"""Evaluated as they are, whatever type their operands had."""
_ANALYTIC = {
    *PRIMITIVES["linear"].split(),
    *PRIMITIVES["linear_in_rest"].split(),
    *PRIMITIVES["bilinear"].split(),
    *_NAMES["entire"].split(),
}
"""Evaluated as they are on real and complex numbers."""
_ENTRY_BY_ENTRY = {*_NAMES["entry by entry"].split()}
_DIVIDING = ("div", "triangular_solve", "tridiagonal_solve")  # analytic in the divisor too
_CALLEES = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_ANALYTIC_CALLS = ("solve", "inv")


class CannotFollow(Exception):
    """What depends on the inputs has no numbers in its place, such as a random key."""


class _Known(NamedTuple):
    """A value, and whether it depends on the inputs; then integers and booleans are real."""

    value: Any
    depends: bool


def with_open_choices(
    fn: Callable[[Mapping[str, Array]], Any], u: Mapping[str, Array]
) -> tuple[Callable[[Mapping[str, Array], Draw], Any], tuple[str, ...]]:
    """Return `fn` with its choices left open, and the places in the user's code that choose.

    Args:
        fn: a function of one step's inputs that JAX can trace.
        u: inputs; only their shapes and types matter.

    Returns:
        `evaluate(u, draw)`, whose integer and boolean inputs are real numbers too, and which gives
        other unknown numbers for every `draw` of standard normal numbers; and the lines at which
        the inputs choose.

    Raises:
        CannotFollow: something that depends on the inputs is neither real nor complex.
    """
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(dict(u))
    places: list[str] = []

    def walk(u: Mapping[str, Array], draw: Draw) -> list[Any]:
        walker = _Walker(draw)
        results = walker.walk(jaxpr, [_Known(leaf, True) for leaf in jax.tree.leaves(dict(u))])
        places.extend(walker.choices)
        return [_real(result.value) for result in results]

    real = {
        name: jax.ShapeDtypeStruct(
            a.shape, a.dtype if jnp.issubdtype(a.dtype, jnp.inexact) else float
        )
        for name, a in u.items()
    }
    walked = jaxpr_as_fun(jax.make_jaxpr(walk)(real, jax.ShapeDtypeStruct((DRAW,), float)))

    def evaluate(u: Mapping[str, Array], draw: Draw) -> Any:
        return jax.tree.unflatten(
            jax.tree.structure(shapes), walked(*jax.tree.leaves(dict(u)), draw)
        )

    return evaluate, tuple(places)


def _real(value: Any) -> Any:
    if _is_inexact(value.dtype):
        return value
    if jnp.issubdtype(value.dtype, jnp.integer) or _is_boolean(value.dtype):
        return value.astype(float)
    raise CannotFollow


class _Walker:
    """Evaluates a jaxpr with open choices."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.drawn = 0
        self.choices: dict[str, None] = {}
        self.call = ""  # where the user's code calls the library function that is walked

    def walk(self, jaxpr: Jaxpr, operands: list[_Known]) -> list[_Known]:
        known = {v: _Known(c, False) for v, c in zip(jaxpr.constvars, jaxpr.consts, strict=True)}
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(atom: Any) -> _Known:
            return _Known(atom.val, False) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if any(operand.depends for operand in inputs):
                results = [
                    _Known(_as_type_of(variable, value), True)
                    for variable, value in zip(eqn.outvars, self.follow(eqn, inputs), strict=True)
                ]
            else:
                results = [_Known(v, False) for v in _bind(eqn, [known.value for known in inputs])]
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def follow(self, eqn: JaxprEqn, operands: list[_Known]) -> list[Any]:
        name = eqn.primitive.name
        if name in _CALLEES:
            if eqn.params.get("name") in _ANALYTIC_CALLS and _by_library(eqn):
                # The order of a pivoted elimination is an integer, which its derivative takes.
                pairs = zip(operands, eqn.invars, strict=True)
                return _bind(eqn, [jnp.asarray(o.value, _dtype(atom)) for o, atom in pairs])
            return self.called(eqn, operands)
        if name == "select_n":
            return [self.mixture(eqn, operands[0], [case.value for case in operands[1:]])]
        if name == "cond":
            branches = [self.walk(b, operands[1:]) for b in eqn.params["branches"]]
            return [
                self.mixture(eqn, operands[0], [result.value for result in results])
                for results in zip(*branches, strict=True)
            ]
        if name == "scan" and eqn.params["length"] <= _LONGEST_LOOP:
            return self.unrolled(eqn, operands)
        if name == "convert_element_type":
            return [self.converted(eqn, operands[0].value)]
        fixed = _positions(name, len(operands))
        inexact = _is_inexact(_dtype(eqn.outvars[0]))
        if not any(operands[position].depends for position in fixed):
            values = [
                operand.value if position in fixed else _real(jnp.asarray(operand.value))
                for position, operand in enumerate(operands)
            ]
            if name in _MOVES or _rearranges(eqn):
                return _bind(eqn, values, preferred_element_type=None)
            if name in _ANALYTIC and inexact:
                return _bind(eqn, values)
        elif name in _DIVIDING and inexact:
            return _bind(eqn, [operand.value for operand in operands])
        if name in _ENTRY_BY_ENTRY:
            return [self.some_function(eqn, operands)]
        self.choice(eqn)
        return [self.unknown(variable) for variable in eqn.outvars]

    def called(self, eqn: JaxprEqn, operands: list[_Known]) -> list[Any]:
        # JAX traces a library function such as `where` once: its lines name whoever called first.
        before = self.call
        if not before and _by_library(eqn):
            self.call = locations.of_equation(eqn)
        results = self.walk(eqn.params[_CALLEES[eqn.primitive.name]], operands)
        self.call = before
        return [result.value for result in results]

    def choice(self, eqn: JaxprEqn) -> None:
        self.choices[self.call or locations.of_equation(eqn)] = None

    def unknown(self, variable: Any) -> Array:
        """Numbers that have to do with nothing."""
        dtype = _dtype(variable)
        if not _is_number(dtype) or jnp.issubdtype(dtype, jnp.complexfloating):
            raise CannotFollow
        self.drawn += 1
        return 0.5 + 0.3 * jnp.sin(self.numbers(f"unknown {self.drawn}", _shape(variable)))

    def numbers(self, label: str, shape: tuple[int, ...]) -> Array:
        """Numbers of the order of 10 that are decided by the draw, others for every label."""
        directions = np.random.default_rng(zlib.crc32(label.encode())).normal(size=(*shape, DRAW))
        return 5 * jnp.asarray(directions) @ self.draw

    def some_function(self, eqn: JaxprEqn, operands: list[_Known]) -> Array:
        """A function of corresponding entries that has to do with `eqn` only in its scale."""
        values = [jnp.asarray(operand.value) for operand in operands]
        result = _dtype(eqn.outvars[0])
        if any(jnp.iscomplexobj(value) for value in values) or not _is_number(result):
            raise CannotFollow
        free = self.number_of(f"{eqn.primitive.name} {eqn.params.get('y')}", values)
        free = jnp.broadcast_to(free, _shape(eqn.outvars[0]))
        if not all(_is_inexact(_dtype(atom)) for atom in [*eqn.invars, eqn.outvars[0]]):
            return free
        (own,) = _bind(eqn, [operand.value for operand in operands])
        return jnp.where(jnp.isfinite(own) & (own != 0), own, 1.0) * (0.5 + free)

    def number_of(self, label: str, values: list[Array]) -> Array:
        """Numbers in [0.2, 0.8], a function of corresponding entries that nothing else uses."""
        phase = 0.0
        for index, value in enumerate(values):
            rates = self.numbers(f"{label}, {index}", (3,))
            real = jnp.nan_to_num(_real(value).astype(float))
            size = jnp.log(jnp.maximum(jnp.abs(real), 1e-300))
            phase = phase + rates[0] * size + rates[1] * jnp.sign(real) + rates[2]
        return 0.5 + 0.3 * jnp.sin(phase)

    def mixture(self, eqn: JaxprEqn, which: _Known, cases: list[Any]) -> Array:
        if not which.depends:
            if eqn.primitive.name == "select_n":
                return jax.lax.select_n(which.value, *(_real(jnp.asarray(c)) for c in cases))
            chosen = jnp.clip(which.value, 0, len(cases) - 1)
            return jnp.stack([_real(jnp.asarray(case)) for case in cases])[chosen]
        self.choice(eqn)
        weight = _real(jnp.asarray(which.value))
        total = 0.0
        for index, case in enumerate(cases):
            label = f"case {index}"
            share = self.number_of(label, [weight])
            if len(cases) == 2:
                share = weight if index else 1 - weight
            real = _real(jnp.asarray(case))
            known = jnp.where(jnp.isfinite(real), real, self.number_of(f"{label} value", [weight]))
            total = total + share * known
        return jnp.asarray(total)

    def converted(self, eqn: JaxprEqn, value: Any) -> Array:
        old, new = _dtype(eqn.invars[0]), eqn.params["new_dtype"]
        if not _is_number(new):
            raise CannotFollow
        if _is_inexact(new):
            return _real(value).astype(new)
        # Every boolean is an integer; a real number or a wider integer is rounded.
        return _real(value) if _is_boolean(old) else self.some_function(eqn, [_Known(value, True)])

    def unrolled(self, eqn: JaxprEqn, operands: list[_Known]) -> list[Any]:
        lengths = [len(part) for part in eqn.params["ft_in"].unpack()]
        first, last = lengths[0], lengths[0] + lengths[1]
        constants, carry, slices = operands[:first], operands[first:last], operands[last:]
        steps = range(eqn.params["length"])
        rows = []
        for t in reversed(steps) if eqn.params["reverse"] else steps:
            now = [_Known(part.value[t], part.depends) for part in slices]
            results = self.walk(eqn.params["jaxpr"], [*constants, *carry, *now])
            carry = results[: len(carry)]
            rows.append([_real(jnp.asarray(row.value)) for row in results[len(carry) :]])
        rows = rows[::-1] if eqn.params["reverse"] else rows
        stacked = [jnp.stack(column) for column in zip(*rows, strict=True)]
        if not rows:
            stacked = [self.unknown(variable) for variable in eqn.outvars[len(carry) :]]
        return [*(_real(jnp.asarray(part.value)) for part in carry), *stacked]


def _bind(eqn: JaxprEqn, values: list[Any], **instead: Any) -> list[Any]:
    params = dict(eqn.params)
    params.update({name: value for name, value in instead.items() if name in params})
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(result) if eqn.primitive.multiple_results else [result]


def _positions(name: str, count: int) -> set[int]:
    """Positions of indices and matrices, among `count` operands."""
    where = MUST_BE_CONSTANT.get(name, (slice(0, 0), ""))[0]
    return set(range(count)[where])


def _rearranges(eqn: JaxprEqn) -> bool:
    """Whether entries are moved by an index, which is known where this is asked."""
    name = eqn.primitive.name
    return name in ("gather", "dynamic_slice", "dynamic_update_slice") or (
        name == "scatter" and eqn.params["update_jaxpr"] is None
    )


def _by_library(eqn: JaxprEqn) -> bool:
    return locations.of_library(eqn.params[_CALLEES[eqn.primitive.name]])


def _as_type_of(variable: Any, value: Any) -> Any:
    dtype = _dtype(variable)
    return value.astype(dtype) if _is_inexact(dtype) else _real(value)


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_boolean(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.bool_))


def _is_number(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.number)) or _is_boolean(dtype)
