"""Refuse a sequence of inputs at which a proved model has no density.

The proof holds for every value of the inputs at which the model makes sense. At a negative scale, a
covariance that is not positive definite or a NaN it does not, and a filter would go on with numbers
that mean nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpyro.distributions import constraints

from design_models import ModelError

from .evaluation import brief
from .proof import Proof, ProvedFunction
from .tracing import Site, innermost, run_with_values

Verdicts = dict[str, dict[str, Array]]
"""For each of a function's sites, and "" for what it returns: what must be, and whether it is."""


def admission(proof: Proof) -> Callable[[Mapping[str, Array]], list[Verdicts]]:
    """Return a compiled check of all steps of a sequence, one function after the other."""

    def judge(u: Mapping[str, Array]) -> list[Verdicts]:
        return [_verdicts(function, proof, u)[0] for function in _functions(proof)]

    return jax.jit(jax.vmap(judge))


def check_inputs(
    proof: Proof,
    judge: Callable[[Mapping[str, Array]], list[Verdicts]],
    inputs: Mapping[str, Array],
    values_are_used: bool = True,
) -> None:
    """Check the parameters of every site at every step; not while JAX traces, without values.

    Args:
        proof: of the model.
        judge: `admission(proof)`.
        inputs: arrays with a leading time axis.
        values_are_used: whether what `inputs` holds as observed must be finite.

    Raises:
        ModelError: with function, site, step, what is wrong there, and its value.
    """
    shapes = {name: np.shape(array) for name, array in inputs.items()}
    lengths = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ModelError(f"`inputs` have lengths {lengths}; give all the same, at least 1 step.")
    if any(isinstance(array, Tracer) for array in inputs.values()):
        return
    judged = judge(dict(inputs))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(judged)):
        return  # inside a trace, a compiled check of plain numbers has no values either
    found = jax.tree.map(np.asarray, judged)
    faults = [
        (int(np.argmin(holds)), rank, part in (_OBSERVED, _DENSITY), name, part)
        for rank, verdicts in enumerate(found)
        for name, parts in verdicts.items()
        for part, holds in parts.items()
        if (part != _OBSERVED or values_are_used) and not holds.all()
    ]
    if faults:  # the first step, and there a parameter rather than what follows from it
        step, rank, _, name, part = min(faults)
        _refuse(proof, _functions(proof)[rank], inputs, name, part, step)


_OBSERVED = "observed value"
_DENSITY = "total log density"
_RETURNED = "result"


def _functions(proof: Proof) -> tuple[ProvedFunction, ...]:
    return proof.transition, proof.observe, proof.readout


def _verdicts(
    function: ProvedFunction, proof: Proof, u: Mapping[str, Array]
) -> tuple[Verdicts, dict[str, Site], Any]:
    """Judge one function at one step, at a memory of zeros and sites at zero."""
    memory = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float), proof.memory)
    returned, sites = run_with_values(function.name, function.call, (memory, u), {})
    verdicts: Verdicts = {}
    for site in sites.values():
        if site.deterministic:
            continue
        parts = verdicts[site.name] = {}
        base = innermost(site.distribution)
        for name, constraint in base.arg_constraints.items():
            parameter = base.__dict__.get(name)
            if parameter is None:
                continue
            holds = jnp.all(jnp.isfinite(parameter))
            if not isinstance(constraint, type(constraints.dependent)):
                holds &= jnp.all(constraint(parameter))
            parts[name] = holds
        if site.observed:
            parts[_OBSERVED] = jnp.all(jnp.isfinite(site.observation))
        parts[_DENSITY] = jnp.isfinite(
            jnp.sum(site.distribution.log_prob(jnp.zeros(jnp.shape(site.value), float)))
        )
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(returned)]
    verdicts[""] = {_RETURNED: jnp.all(jnp.stack(leaves))} if leaves else {}
    return verdicts, sites, returned


def _refuse(
    proof: Proof,
    function: ProvedFunction,
    inputs: Mapping[str, Array],
    name: str,
    part: str,
    step: int,
) -> None:
    u = {name: jnp.asarray(array)[step] for name, array in inputs.items()}
    _, sites, returned = _verdicts(function, proof, u)
    must = "finite"
    if not name:
        value = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(returned)])
        raise ModelError(
            f"`{function.name}`, step {step + 1}: it returns {brief(value)} for a memory of zeros; "
            "it must be finite. Correct the inputs of that step."
        )
    site = sites[name]
    base = innermost(site.distribution)
    if part == _OBSERVED:
        value, must = site.observation, "finite; give a missing entry a large noise variance"
    elif part == _DENSITY:
        value, must = site.distribution.log_prob(jnp.zeros(jnp.shape(site.value), float)), "finite"
    else:
        value = base.__dict__[part]
        constraint = base.arg_constraints[part]
        if not isinstance(constraint, type(constraints.dependent)):
            must = f"{constraint} and finite"
    raise ModelError(
        f"`{function.name}`, site '{name}', step {step + 1}: its {part} is {brief(value)}; it must "
        f"be {must}. Correct the inputs of that step ({site.location})."
    )
