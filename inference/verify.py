"""Verification: a design model's exact filter, derived and then judged by independent oracles."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jaxtyping import Array

from design_models import DesignModel, ModelError
from design_models.catalogue import recurrence
from design_models.policy import Exact, Policy

from .certificate import Certificate, package_versions
from .claim import Claimant, claimant
from .derivation import derive
from .divergence import STREAM, reduction_cost
from .equations import equations
from .exact_filter import ExactFilter
from .kinship import find_kin
from .oracles import joint, nuts, simulation, textbook
from .oracles.check import Check
from .oracles.program import Program, Seen

_LONGEST, _SHORTEST = 4, 2
_FEW_LATENTS, _MOST_LATENTS = 40, 800

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Scene:
    """Inputs and simulated observations that the oracles judge a filter on."""

    inputs: Mapping[str, Array]
    seen: Seen
    seed: int


def set_scene(exact: ExactFilter, seed: int) -> Scene:
    """Draw inputs and simulate observations; as many steps, up to 4, as the memory's size allows.

    Raises:
        ModelError: the memory is too large for the oracles, which are dense.
    """
    entries = exact.partition.states.size
    if entries * (_SHORTEST + 1) > _MOST_LATENTS:
        raise ModelError(
            f"the memory has {entries} entries; the oracles condition on every entry at every step "
            f"and take up to {_MOST_LATENTS // (_SHORTEST + 1)}. Verify a narrower instance of the "
            "model: what is proved does not depend on its width."
        )
    steps = max(_SHORTEST, min(_LONGEST, _FEW_LATENTS // entries - 1))
    inputs = exact.model.draw_inputs(jax.random.key(seed), steps)
    _, _, seen = Program(exact.model, inputs).simulate(jax.random.key(seed + 1))
    return Scene(inputs, seen, seed)


def verify(
    model: DesignModel | str,
    *,
    name: str = "",
    policy: Policy | None = None,
    seed: int = 0,
    progress: Progress = lambda stage: None,
) -> Certificate:
    """Derive a design model's exact filter and verify it against three independent oracles.

    Joint conditioning decides to rounding; NUTS and simulation decide at a false-alarm rate of
    0.001 each. Under a policy other than exact, the exact filter is verified in the same way, the
    reduction against a textbook recursion, and its divergence from the exact posterior is measured.

    Args:
        model: a design model, or the name of a catalogue entry.
        name: what to call it; the catalogue's name where that is given.
        policy: what is done to the covariance before each write; a catalogue entry's own, else
            exact.
        seed: seed of inputs, simulated observations and chains.
        progress: called with the name of each stage as it begins.

    Returns:
        A certificate; `holds` says whether all checks hold.

    Raises:
        NotLinearGaussian: the model is refused, with function, site, reason, file and line.
        ModelError: the name is unknown, or the inputs do not fit.
    """
    start = time.perf_counter()
    if isinstance(model, str):
        entry = recurrence(model)
        name, policy, model = entry.name, policy or entry.policy, entry.model()
    policy = policy or Exact()
    with jax.enable_x64(True):
        progress("derive")
        exact = derive(model)
        scene = set_scene(exact, seed)
        checks = judge(exact.model, claimant(exact), scene, progress)
        cost = None
        if not isinstance(policy, Exact):
            progress("policy")
            reduced = claimant(exact, policy)
            checks += textbook.judge(model, policy, reduced, scene.inputs, scene.seen)
            stream = model.draw_inputs(jax.random.key(seed + 2), STREAM)
            cost = reduction_cost(exact, policy, stream, jax.random.key(seed + 3))
        progress("describe")
        return Certificate(
            name or "model",
            policy,
            exact.structure,
            tuple(equations(exact)),
            find_kin(exact.structure),
            tuple(checks),
            cost,
            seed,
            len(scene.seen),
            _sites(exact),
            time.perf_counter() - start,
            package_versions(),
            exact,
        )


def judge(
    model: DesignModel,
    claim: Claimant,
    scene: Scene,
    progress: Progress = lambda stage: None,
) -> list[Check]:
    """Judge any claim to be the exact filter of `model` by all three oracles."""
    progress(joint.ORACLE)
    checks = joint.judge(model, claim, scene.inputs, scene.seen)
    progress(simulation.ORACLE)
    checks += simulation.judge(model, claim, scene.inputs, seed=scene.seed + 4)
    progress(nuts.ORACLE)
    checks += nuts.judge(model, claim, scene.inputs, scene.seen, seed=scene.seed + 5)
    return checks


def _sites(exact: ExactFilter) -> tuple[str, ...]:
    proof = exact.proof
    return tuple(
        f"{function.name}/{site.name}: {site.family} {site.shape}"
        + (" observed" if site.observed else "")
        for function in (proof.prior, proof.transition, proof.observe, proof.readout)
        for site in function.sites
    )
