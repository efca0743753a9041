"""From a design model to its exact filter."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from design_models import DesignModel, ModelError
from design_models.example_inputs import check_input

from . import locations
from .errors import NotSupported
from .evaluation import check_sites, check_steps
from .exact_filter import ExactFilter
from .extraction import prior_belief
from .generic import generic_steps, open_steps
from .partition import Partition, discover, divide, undivided
from .proof import Proof, prove, prove_prior
from .structure import Structure, describe, with_choices, without_claims
from .widening import widen_partition

LARGEST_DENSE_MEMORY = 512
"""Structure is discovered from dense coefficients, for memories of up to this many entries."""

_CHECKED_STEPS = 4


def derive(model: DesignModel, inputs: Mapping[str, Array] | None = None) -> ExactFilter:
    """Derive the exact filter of a design model.

    The model is proved linear-Gaussian (`inference.proof`), its coefficients are extracted and
    compared with plain evaluations (`inference.evaluation`), and its structure is discovered
    (`inference.partition`). Everything runs in float64.

    Args:
        model: the design model.
        inputs: example inputs with a leading time axis; drawn by the model where left out. The
            filter is exact for every input; these decide shapes, and generic values around them
            decide the structure.

    Raises:
        NotLinearGaussian: with function, site, reason, file and line.
        ModelError: the inputs do not fit the model.
    """
    if not isinstance(model, DesignModel):
        raise ModelError(
            f"`model` is a {type(model).__name__}; derive a DesignModel "
            "(a whole NumPyro model becomes one by `design_models.from_scan`)."
        )
    with jax.enable_x64(True):
        exact = draft(model, inputs)
        check_steps(exact.proof, exact.partition, exact.examples, jax.random.key(0))
        return exact


def draft(model: DesignModel, inputs: Mapping[str, Array] | None = None) -> ExactFilter:
    """Derive a filter without comparing its matrices with plain evaluations."""
    with jax.enable_x64(True):
        proof, examples = prove_at_examples(model, inputs)
        size = sum(leaf.size for leaf in jax.tree.leaves(proof.memory))
        if size > LARGEST_DENSE_MEMORY:
            raise NotSupported(
                "prior",
                "",
                f"the memory has {size} entries; structure is discovered on at most "
                f"{LARGEST_DENSE_MEMORY}: derive a narrower instance of the model, then "
                "`widen` it to this one",
            )
        check_example_sites(proof, examples)
        partition, structure = discover_structure(proof, examples)
        return ExactFilter(model, proof, partition, structure, examples)


def widen(exact: ExactFilter, model: DesignModel) -> ExactFilter:
    """Take a derived filter to a wider instance of its model, without dense coefficients.

    The structure is carried over, and then certified at the new size: every coefficient is
    compared with plain evaluations at random memories and draws in which all entries take part.

    Args:
        exact: the filter of a narrow instance.
        model: the same design model at other widths.

    Raises:
        NotLinearGaussian: the wider model is refused, or has another structure.
        ModelError: the structure does not carry over to another width.
    """
    with jax.enable_x64(True):
        proof, examples = prove_at_examples(model)
        check_example_sites(proof, examples)
        partition = widen_partition(exact.partition, exact.proof, proof)
        wide = ExactFilter(model, proof, partition, exact.structure, examples)
        check_steps(proof, partition, examples, jax.random.key(0))
        return wide


def prove_at_examples(
    model: DesignModel, inputs: Mapping[str, Array] | None = None
) -> tuple[Proof, dict[str, Array]]:
    """Prove a model linear-Gaussian; also return its example inputs, drawn where left out."""
    examples = _examples(model, inputs)
    return prove(model, {name: array[0] for name, array in examples.items()}), examples


def check_example_sites(proof: Proof, examples: Mapping[str, Array]) -> None:
    """Check every site's parameters and density at the examples."""
    for t in range(len(jax.tree.leaves(examples)[0])):
        u = {name: array[t] for name, array in examples.items()}
        check_sites(proof, u, jax.random.key(t))


def draw_inputs(model: DesignModel, rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
    """Draw a model's example inputs; say where it failed if it fails.

    Raises:
        NotLinearGaussian: the prior is refused.
        ModelError: the inputs cannot be drawn.
    """
    prove_prior(model)  # defaults take their widths from the prior
    try:
        return model.draw_inputs(rng, steps)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"drawing inputs raised {type(error).__name__}: {' '.join(str(error).split())} "
            f"({locations.of_error(error)})."
        ) from error


def _examples(model: DesignModel, inputs: Mapping[str, Array] | None) -> dict[str, Array]:
    """The first few steps of the inputs, in float64."""
    if inputs is None:
        inputs = draw_inputs(model, jax.random.key(0), _CHECKED_STEPS)
    checked = {name: check_input(name, value, None) for name, value in inputs.items()}
    lengths = {name: len(array) for name, array in checked.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ModelError(f"`inputs` have lengths {lengths}; give all the same, at least 1 step.")
    return {
        name: array[:_CHECKED_STEPS].astype(float)
        if jnp.issubdtype(array.dtype, jnp.floating)
        else array[:_CHECKED_STEPS]
        for name, array in checked.items()
    }


def discover_structure(proof: Proof, examples: Mapping[str, Array]) -> tuple[Partition, Structure]:
    """Discover the structure that every input shares."""
    size = sum(leaf.size for leaf in jax.tree.leaves(proof.memory))
    whole = undivided(
        size,
        sum(site.size for site in proof.transition.observed),
        sum(site.size for site in proof.observe.observed),
    )
    prior = np.asarray(jax.jit(lambda: prior_belief(proof, whole))().covariance)

    opened = open_steps(proof, whole, examples)
    if opened is None:
        step, _ = generic_steps(proof, whole, examples)
        return whole, without_claims(describe(proof.memory, whole, step, prior[0]))
    step, places = opened

    def dense(array: Any) -> np.ndarray | None:
        return None if array is None else np.asarray(array)[:, 0]

    evidence, observation = step.evidence, step.observation
    partition = discover(
        {
            "prior": prior,
            "transition": dense(step.transition),
            "drift": dense(step.drift),
            "evidence": dense(evidence and evidence.observation),
            "evidence_noise": dense(evidence and evidence.noise),
            "cross": dense(evidence and evidence.cross),
            "observation": dense(observation and observation.observation),
            "noise": dense(observation and observation.noise),
        }
    )
    structure = describe(proof.memory, partition, divide(step, partition), prior[0])
    return partition, with_choices(structure, places)
