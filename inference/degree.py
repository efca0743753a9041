r"""Prove that outputs are polynomials of degree at most two in chosen inputs, by reading a jaxpr.

This is abstract interpretation. Every array of the program is described by a `_Value`:

* `degree` in 0 < 1 < 2 < 3: every entry is a polynomial of at most that degree in the real
  coordinates of the latents, with coefficients that do not depend on them; 3 promises nothing;
* `truth` in {True, False} < None: the boolean that every entry equals for finite latents;
* `bounded`, True < False: every entry is a finite number for finite latents.

Values are ordered entry by entry, and `_join` gives a least upper bound. One rule per primitive
maps descriptions of its operands to a description of its results, and is sound when results of
any arrays so described are as described: a linear map keeps the largest degree, a bilinear map
adds two degrees, a function of constants is constant, and everything else is 3. A primitive
without a rule is 3 as soon as it reads a latent, so a gap in the tables can reject a model, never
certify one.

**Loops.** Let c be the description of a carry and F(c) that of the body's results. `_fixpoint`
replaces c by join(c, F(c)) until nothing changes. Each change climbs a finite order (at most
3 + 1 + 1 steps per carried array), so this ends, for any F. At the end F(c) <= c and c is above the
initial carry, so by induction over iterations c describes the carry after any number of them;
monotonicity of F is needed only for c to be the *least* such description. A body that squares
its carry climbs 1, 2, 3; one that multiplies it by a constant stays.

**Guards.** NumPyro wraps densities in `where(isfinite(value), density, -inf)`. A condition with
known `truth` selects one branch. A condition that is constant but unknown selects either, so the
branches are joined.

**What is claimed.** Arithmetic is taken as exact and conversions that round are refused, as are
operations whose derivative is chosen by the user (`stop_gradient`, `custom_jvp`, `custom_vjp`):
for those a polynomial read off by differentiation need not be the function. The `solve` of
`custom_linear_solve` is proven to keep degrees, and is trusted to be linear. Coefficients that are
not finite numbers (a constant 1/0) are out of scope: they only enter where a polynomial so made
is compared with infinity or itself. A side effect that reads a latent spoils every output, since
what it wrote (a mutable array, a file) may come back unseen.

Source: Cousot & Cousot (1977), POPL, for the method; the degree lattice is elementary algebra.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, primitives

from . import locations

NOT_POLYNOMIAL = 3

# Primitives of jax 0.11.2, by the rule that covers them (`_RULES`, at the end).
PRIMITIVES = {
    "move": "broadcast_in_dim concatenate copy name pad reshape rev sharding_constraint slice split"
    " squeeze stack tile transpose unstack",  # entries of the operands, rearranged
    "each": "device_put optimization_barrier",  # result i is operand i
    "linear": "add add_any complex conj cumsum fft imag neg real reduce_sum reduce_window_sum sub",
    "linear_in_rest": "div dynamic_slice dynamic_update_slice gather scatter scatter-add"
    " scatter-sub triangular_solve tridiagonal_solve",
    "bilinear": "conv_general_dilated dot_general mul",
    "power": "integer_pow one_minus_square pow square",
    "linear_solve": "custom_linear_solve",
    "convert": "convert_element_type",
    "is_finite": "is_finite",
    "compare": "eq ge gt le lt ne",
    "logic": "and or reduce_and reduce_or",
    "not": "not",
    "select": "select_n",
    "call": "eval_jaxpr jit remat2",
    "cond": "cond",
    "scan": "scan",
    "while": "while",
}
MUST_BE_CONSTANT = {  # operands in which the primitive is not linear, and what they are
    "div": (slice(1, 2), "division by a quantity that"),
    "dynamic_slice": (slice(1, None), "an index"),
    "dynamic_update_slice": (slice(2, None), "an index"),
    "gather": (slice(1, 2), "an index"),
    "scatter": (slice(1, 2), "an index"),
    "scatter-add": (slice(1, 2), "an index"),
    "scatter-sub": (slice(1, 2), "an index"),
    "triangular_solve": (slice(0, 1), "the matrix of a linear solve"),
    "tridiagonal_solve": (slice(0, 3), "the matrix of a linear solve"),
}
CALLEES = {"jit": "jaxpr", "remat2": "jaxpr", "eval_jaxpr": "call_jaxpr"}  # their parameter
ABSORBING = {"and": False, "or": True, "reduce_and": False, "reduce_or": True}
REASONS = {
    "stop_gradient": "`stop_gradient` hides the latent from differentiation",
    "custom_jvp_call": "the latent passes through an operation with a custom derivative",
    "custom_vjp_call": "the latent passes through an operation with a custom derivative",
    "pure_callback": "the latent passes through a Python callback",
}


@dataclass(frozen=True)
class Degree:
    """What is proven about one output of a function, as a polynomial in its latents."""

    degree: int  # 0 constant, 1 affine, 2 quadratic, 3 = NOT_POLYNOMIAL: not shown to be any
    finite: bool = False  # a boolean array that is True whenever every latent is finite
    reason: str = ""  # why `degree` is 3, in the user's words
    location: str = ""  # "path:line (function)" of the user's offending line, "" if unknown


@dataclass(frozen=True)
class _Value:
    degree: int = 0
    truth: bool | None = None
    bounded: bool = False
    reason: str = field(default="", compare=False)
    location: str = field(default="", compare=False)


type _Values = Sequence[_Value]


class _SideEffect(Exception):
    def __init__(self, value: _Value) -> None:
        super().__init__(value.reason)
        self.value = value


def degrees(fn: Callable[..., Any], latents: Any, *constants: Any) -> Any:
    """Bound the degree of each output of `fn(latents, *constants)` in the entries of `latents`.

    Args:
        fn: a function that JAX can trace.
        latents: pytree of real or complex arrays (or `jax.ShapeDtypeStruct`); only their shapes
            and types matter.
        constants: further arguments, held fixed. Their values matter only through being finite.

    Returns:
        A pytree of `Degree` with the structure of the output: an upper bound, exact for no one.
        Integer and boolean latents are not polynomial coordinates, and spoil what reads them.
    """
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(latents, *constants)
    latent_count = len(jax.tree.leaves(latents))
    operands = [_latent(_aval(variable).dtype) for variable in jaxpr.invars[:latent_count]]
    operands += [_constant(leaf) for leaf in jax.tree.leaves(constants)]
    try:
        values = _interpret(jaxpr, operands)
    except _SideEffect as effect:
        values = [effect.value] * len(jaxpr.outvars)
    proven = [Degree(v.degree, v.truth is True, v.reason, v.location) for v in values]
    return jax.tree.unflatten(jax.tree.structure(shapes), proven)


def _aval(atom: Any) -> Any:
    return atom.aval  # of a variable or a literal: type and shape


def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _rounds(old: Any, new: Any) -> bool:
    """Whether some number of type `old` is not a number of type `new`; complex to real is not."""
    if not (_is_inexact(old) and _is_inexact(new)):
        return _is_inexact(old)
    old, new = jnp.finfo(old), jnp.finfo(new)
    return bool(new.nmant < old.nmant or new.maxexp < old.maxexp or new.minexp > old.minexp)


def _latent(dtype: Any) -> _Value:
    if _is_inexact(dtype):
        return _Value(1, bounded=True)
    return _Value(NOT_POLYNOMIAL, reason=f"the latent has type {dtype}, not a floating-point type")


def _constant(array: Any) -> _Value:
    if isinstance(array, Tracer):
        return _Value()
    try:
        return _Value(bounded=bool(np.all(np.isfinite(array))))
    except TypeError:  # random keys and arrays given by their shape
        return _Value()


def _join(values: _Values) -> _Value:
    """Least upper bound: what holds for an array with entries from any of `values`."""
    worst = max(values, key=lambda value: value.degree)
    truths = {value.truth for value in values}
    truth = truths.pop() if len(truths) == 1 else None
    bounded = all(value.bounded for value in values)
    return replace(worst, truth=truth, bounded=bounded)


def _refuse(eqn: JaxprEqn, operands: _Values, reason: str) -> _Value:
    """Describe the result of any function at all: constant if its operands are, else 3."""
    worst = _join(operands) if operands else _Value()
    if worst.degree in (0, NOT_POLYNOMIAL):
        return replace(worst, truth=None, bounded=False)
    return _Value(NOT_POLYNOMIAL, reason=reason, location=locations.of_equation(eqn))


def _interpret(jaxpr: Jaxpr, operands: _Values) -> list[_Value]:
    """Describe the results of `jaxpr` for operands as described."""
    values = dict(zip(jaxpr.constvars, map(_constant, jaxpr.consts), strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> _Value:
        return _constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.effects and any(value.degree for value in inputs):
            reason = f"the latent reaches a side effect (`{eqn.primitive.name}`)"
            raise _SideEffect(_refuse(eqn, inputs, reason))
        outputs = _RULES.get(eqn.primitive, _unknown)(eqn, inputs)
        if isinstance(outputs, _Value):
            outputs = [outputs] * len(eqn.outvars)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _fixpoint(
    body: Jaxpr, constants: _Values, carry: _Values, slices: _Values
) -> tuple[list[_Value], list[_Value]]:
    """Describe the carry of a loop after any number of iterations, and what each one emits."""
    carry = list(carry)
    while True:
        outputs = _interpret(body, [*constants, *carry, *slices])
        grown = [_join(pair) for pair in zip(carry, outputs[: len(carry)], strict=True)]
        if grown == carry:
            return carry, outputs[len(carry) :]
        carry = grown


def _unknown(eqn: JaxprEqn, operands: _Values) -> _Value:
    name = eqn.primitive.name
    reason = REASONS.get(name, f"`{name}` of a quantity that depends on the latent")
    value = _refuse(eqn, operands, reason)
    return replace(value, bounded=name == "abs" and operands[0].bounded)  # isinf is abs(x) == inf


def _move(eqn: JaxprEqn, operands: _Values) -> _Value:
    return _join(operands)


def _each(eqn: JaxprEqn, operands: _Values) -> _Values:
    return operands


def _linear(eqn: JaxprEqn, operands: _Values) -> _Value:
    return replace(_join(operands), truth=None)


def _linear_in_rest(eqn: JaxprEqn, operands: _Values) -> _Value:
    name, rest = eqn.primitive.name, list(operands)
    where, what = MUST_BE_CONSTANT[name]
    if any(value.degree for value in operands[where]):
        return _refuse(eqn, operands, f"{what} depends on the latent")
    if name == "scatter" and eqn.params["update_jaxpr"] is not None:  # `x.at[i].apply(f)`
        return _refuse(eqn, operands, "`at[].apply` of a function to the latent")
    del rest[where]
    # An index out of bounds gathers NaN, a matrix may be singular, a divisor may be zero.
    divisor = eqn.invars[1] if name == "div" else None
    finite = isinstance(divisor, Literal) and bool(np.all(divisor.val != 0))
    value = _join(rest)
    return replace(value, truth=None, bounded=value.bounded and finite)


def _bilinear(eqn: JaxprEqn, operands: _Values) -> _Value:
    left, right = operands
    degree = left.degree + right.degree
    if degree >= NOT_POLYNOMIAL:
        return _refuse(eqn, operands, f"product of total degree {degree} in the latent")
    # A pair of precisions, one per operand; a named algorithm may round its operands.
    precision = eqn.params.get("precision")
    pair = precision if type(precision) is tuple else (precision,)
    result = _aval(eqn.outvars[0]).dtype
    if any(_rounds(_aval(atom).dtype, result) for atom in eqn.invars) or not all(
        part is None or isinstance(part, jax.lax.Precision) for part in pair
    ):
        return _refuse(eqn, operands, "a product that depends on the latent is rounded")
    return _Value(degree, bounded=left.bounded and right.bounded)


def _power(eqn: JaxprEqn, operands: _Values) -> _Value:
    exponent = eqn.params.get("y", 2)
    if eqn.primitive.name == "pow":
        power = eqn.invars[1]
        exponent = power.val if isinstance(power, Literal) and np.ndim(power.val) == 0 else None
    whole = next((n for n in (0, 1, 2) if n == exponent), NOT_POLYNOMIAL)
    if operands[0].degree * whole < NOT_POLYNOMIAL and whole < NOT_POLYNOMIAL:
        return _Value(operands[0].degree * whole, bounded=operands[0].bounded)
    which = "a power" if exponent is None else f"power {exponent}"
    return _refuse(eqn, operands, f"{which} of a quantity that depends on the latent")


def _linear_solve(eqn: JaxprEqn, operands: _Values) -> list[_Value] | _Value:
    lengths = eqn.params["const_lengths"]
    constants, sides = operands[: sum(lengths)], operands[sum(lengths) :]
    if any(value.degree for value in constants):
        return _refuse(eqn, operands, "the matrix of a linear solve depends on the latent")
    # JAX differentiates a solve by calling it on tangents, which is right only if it is linear.
    start = lengths.matvec + lengths.vecmat
    inputs = [*constants[start : start + lengths.solve], *(replace(v, truth=None) for v in sides)]
    results = _interpret(eqn.params["jaxprs"].solve, inputs)
    if any(result.degree > _join(sides).degree for result in results):
        worst = _join(results)
        return _refuse(eqn, operands, worst.reason or "a linear solve that is not linear")
    return [replace(result, bounded=False) for result in results]


def _convert(eqn: JaxprEqn, operands: _Values) -> _Value:
    old, new = _aval(eqn.invars[0]).dtype, _aval(eqn.outvars[0]).dtype
    if _is_inexact(old) and not _rounds(old, new):
        return replace(operands[0], truth=None)
    result = _refuse(eqn, operands, f"rounding a quantity that depends on the latent to {new}")
    whole = not _is_inexact(old) and _is_inexact(new) and bool(jnp.finfo(new).maxexp > 64)
    return replace(result, bounded=whole)  # no integer overflows a type of this range


def _is_finite(eqn: JaxprEqn, operands: _Values) -> _Value:
    # Sums, products and quotients by constants never turn a non-finite entry into a finite one
    # for some latents only, so on a polynomial the answer is constant even where it is unknown.
    if operands[0].bounded:
        return _Value(truth=True)
    return _Value() if operands[0].degree < NOT_POLYNOMIAL else _unknown(eqn, operands)


def _compare(eqn: JaxprEqn, operands: _Values) -> _Value:
    # isnan is `x != x`, isinf is `abs(x) == inf`: any finite x, so 0, gives the answer.
    sides = [0.0, 0.0]
    for position, atom in enumerate(eqn.invars):
        if isinstance(atom, Literal) and jnp.issubdtype(_aval(atom).dtype, jnp.floating):
            infinite = np.ndim(atom.val) == 0 and np.isinf(atom.val)
            sides[position] = float(atom.val) if infinite else 0.0
    unknown = [v for v, side in zip(operands, sides, strict=True) if side == 0.0]
    if eqn.invars[0] is not eqn.invars[1] and len(unknown) != 1:
        return _refuse(eqn, operands, "comparison of a quantity that depends on the latent")
    if all(value.bounded for value in unknown):
        return _Value(truth=bool(getattr(operator, eqn.primitive.name)(*sides)))
    return _Value() if _join(unknown).degree < NOT_POLYNOMIAL else _unknown(eqn, operands)


def _logic(eqn: JaxprEqn, operands: _Values) -> _Value:
    absorbing = ABSORBING[eqn.primitive.name]
    truths = {value.truth for value in operands}
    # Over no entries at all, `all` is True and `any` is False whatever the description says.
    some = all(_aval(atom).size > 0 for atom in eqn.invars)
    if some and absorbing in truths:
        return _Value(truth=absorbing)
    if some and truths == {not absorbing}:
        return _Value(truth=not absorbing)
    return _unknown(eqn, operands)


def _not(eqn: JaxprEqn, operands: _Values) -> _Value:
    truth = operands[0].truth
    return _unknown(eqn, operands) if truth is None else _Value(truth=not truth)


def _select(eqn: JaxprEqn, operands: _Values) -> _Value:
    which, *cases = operands
    if which.degree:
        return _refuse(eqn, operands, "a choice (where/select) depends on the latent")
    return _join(cases) if which.truth is None else cases[int(which.truth)]


def _call(eqn: JaxprEqn, operands: _Values) -> list[_Value]:
    callee = eqn.params[CALLEES[eqn.primitive.name]]
    outputs = _interpret(callee, operands)
    # JAX traces a library function such as `where` once: its lines name whoever called it first.
    if not locations.of_library(callee):
        return outputs
    before, here = {(v.reason, v.location) for v in operands}, locations.of_equation(eqn)
    return [
        replace(v, location=here) if v.reason and (v.reason, v.location) not in before else v
        for v in outputs
    ]


def _cond(eqn: JaxprEqn, operands: _Values) -> list[_Value] | _Value:
    index, *inputs = operands
    if index.degree:
        return _refuse(eqn, operands, "the branch taken depends on the latent")
    branches = [_interpret(branch, inputs) for branch in eqn.params["branches"]]
    return [_join(results) for results in zip(*branches, strict=True)]


def _scan(eqn: JaxprEqn, operands: _Values) -> list[_Value]:
    lengths = [len(part) for part in eqn.params["ft_in"].unpack()]
    first, last = lengths[0], lengths[0] + lengths[1]
    constants, carry, slices = operands[:first], operands[first:last], operands[last:]
    carry, stacked = _fixpoint(eqn.params["jaxpr"], constants, carry, slices)
    return [*carry, *stacked]


def _while(eqn: JaxprEqn, operands: _Values) -> list[_Value] | _Value:
    test, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    constants, start = operands[test : test + body], operands[test + body :]
    carry, _ = _fixpoint(eqn.params["body_jaxpr"], constants, start, [])
    (condition,) = _interpret(eqn.params["cond_jaxpr"], [*operands[:test], *carry])
    if condition.degree:
        return _refuse(eqn, operands, "the number of iterations depends on the latent")
    return carry


_JAX_OWN = {  # by name; anyone may name a primitive of their own "add"
    primitive.name: primitive
    for module in (jax.lax, primitives)
    for primitive in vars(module).values()
    if isinstance(primitive, Primitive)
}
_RULES = {
    _JAX_OWN[name]: globals()[f"_{rule}"]
    for rule, names in PRIMITIVES.items()
    for name in names.split()
}
