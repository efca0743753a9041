"""Faults planted in derived filters and in their reductions, to measure what the oracles catch.

Each fault alters one step of a filter that is otherwise honest: its coefficients, the belief it
carries, or what it reports.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from design_models import CATALOGUE, DesignModel
from design_models.policy import Exact, Policy, Reset
from inference.claim import Claim, Claimant, claimant
from inference.exact_filter import ExactFilter
from inference.extraction import arrange_observed
from inference.kalman import predict
from inference.linear_gaussian import Belief, Observed, Step
from inference.oracles import joint, nuts, simulation, textbook
from inference.oracles.check import Check
from inference.policies import advance_under
from inference.verify import Scene

WIDTH = 2
"""Value and key width of every case: the smallest at which all faults differ."""


@dataclass(frozen=True)
class Case:
    """A filter that faults are planted in.

    Args:
        name: the catalogue's name, and what is varied.
        model: its design model.
        policy: `Exact()`, or the reduction of a catalogue entry.
        unit_keys: whether the model normalises its keys.
    """

    name: str
    model: DesignModel
    policy: Policy
    unit_keys: bool = False

    @property
    def exact(self) -> bool:
        return isinstance(self.policy, Exact)


def catalogue_cases() -> list[Case]:
    """Every recurrence, the exact filter of every reduction's model, and models with unit keys."""
    cases = []
    for entry in CATALOGUE.values():
        model = entry.model(WIDTH, WIDTH)
        cases.append(Case(entry.name, model, entry.policy))
        if not isinstance(entry.policy, Exact) and entry.name != "deltanet":
            # Without its reset, deltanet is bayesian_static.
            cases.append(Case(f"{entry.name}, unreduced", model, Exact()))
        if entry.name in ("bayesian_layer", "linear_attention"):
            cases.append(Case(f"{entry.name}, unit keys", with_unit_keys(model), Exact(), True))
    return cases


def with_unit_keys(model: DesignModel) -> DesignModel:
    """The same model of keys divided by their norm."""

    def unit(u: Mapping[str, Array]) -> dict[str, Array]:
        return {**u, "key": u["key"] / jnp.linalg.norm(u["key"])}

    return replace(
        model,
        transition=lambda memory, u: model.transition(memory, unit(u)),
        observe=lambda memory, u: model.observe(memory, unit(u)),
        inputs=model.draw_inputs,
    )


@dataclass(frozen=True)
class Moment:
    """One step of a filter under test: the belief before it and all that the step brings."""

    exact: ExactFilter
    policy: Policy
    belief: Belief
    step: Step
    observed: Observed
    u: Mapping[str, Array]

    def advance(self) -> tuple[Belief, Float[Array, ""]]:
        """The honest step: (posterior, log evidence)."""
        prior = self.exact.initial()
        return advance_under(self.policy, self.belief, prior, self.step, self.observed, self.u)

    def predicted(self) -> Belief:
        return predict(self.belief, self.step)

    def after(self, predicted: Belief) -> "Moment":
        """The same write on another predicted belief; for evidence about the memory only."""
        width = predicted.mean.shape[-1]
        still = eqx.tree_at(
            lambda step: (step.transition, step.shift, step.drift),
            self.step,
            (
                jnp.broadcast_to(jnp.eye(width), self.step.transition.shape),
                jnp.zeros_like(self.step.shift),
                jnp.zeros_like(self.step.drift),
            ),
        )
        return replace(self, belief=predicted, step=still)


class Told(eqx.Module):
    """What a filter does with a step: carries on, reports, reads out, and scores."""

    carried: Belief
    reported: Belief
    read: Belief
    log_evidence: Float[Array, ""]


@dataclass(frozen=True)
class Fault:
    """A mistake in a filter.

    Args:
        name: what is wrong.
        applies: `applies(case, exact)`, whether the filter can have it.
        plant: `plant(moment)`, the step with the mistake.
    """

    name: str
    applies: Callable[[Case, ExactFilter], bool]
    plant: Callable[[Moment], Told]


def faulty(fault: Fault, exact: ExactFilter, policy: Policy) -> Claimant:
    """A derived filter, or its reduction, with a fault planted in every step."""
    split = sum(site.size for site in exact.proof.transition.observed)

    def claim(inputs: Mapping[str, Array], observed: Float[Array, "time seen"]) -> Claim:
        steps = jax.vmap(exact.coefficients)(inputs)
        seen = jax.vmap(lambda y: arrange_observed(exact.partition, y[:split], y[split:]))(observed)

        def body(belief, moment):
            told = fault.plant(Moment(exact, policy, belief, *moment))
            return told.carried, (told.reported, told.read, told.log_evidence)

        _, (reported, read, log_evidence) = jax.lax.scan(
            body, exact.initial(), (steps, seen, inputs)
        )
        predictions = jax.vmap(exact.read)(read, inputs)
        return Claim(
            jax.vmap(exact.flat)(reported.mean),
            jax.vmap(exact.dense_covariance)(reported.covariance),
            predictions.mean,
            predictions.variance,
            log_evidence,
        )

    return claim


def _reset(moment: Moment) -> Told:
    """The covariance is that of the prior before every write."""
    prior = moment.exact.initial().covariance
    if moment.step.observation is None:
        belief = Belief(moment.belief.mean, prior)
        return _tell(replace(moment, belief=belief))
    return _tell(moment.after(Belief(moment.predicted().mean, prior)))


def _gain(moment: Moment) -> Told:
    posterior, added = moment.advance()
    predicted = moment.predicted().mean
    wrong = Belief(predicted + 1.05 * (posterior.mean - predicted), posterior.covariance)
    return Told(wrong, wrong, wrong, added)


def _no_drift(moment: Moment) -> Told:
    """Process noise never enters the covariance; evidence about it still moves the mean."""
    if moment.step.observation is not None:
        drift = jnp.zeros_like(moment.step.drift)
        return _tell(replace(moment, step=eqx.tree_at(lambda s: s.drift, moment.step, drift)))
    posterior, added = moment.advance()
    kept = moment.predicted().covariance - moment.step.drift
    wrong = Belief(posterior.mean, kept)
    return Told(wrong, wrong, wrong, added)


def _late_decay(moment: Moment) -> Told:
    """The memory is written first, then decays."""
    width = moment.belief.mean.shape[-1]
    decay = moment.step.transition
    still = jnp.broadcast_to(jnp.eye(width), decay.shape)
    step = eqx.tree_at(lambda s: s.transition, moment.step, still)
    written, added = replace(moment, step=step).advance()
    wrong = Belief(written.mean @ decay.mT, decay @ written.covariance @ decay.mT)
    return Told(wrong, wrong, wrong, added)


def _noise(moment: Moment) -> Told:
    """Noise 5 % up; of evidence about the change, the part that is not the change itself."""
    step = moment.step
    if step.observation is not None:
        step = eqx.tree_at(lambda s: s.observation.noise, step, 1.05 * step.observation.noise)
    if step.evidence is not None:
        given = step.evidence
        explained = given.cross.mT @ jnp.linalg.solve(step.drift, given.cross)
        noise = given.noise + 0.05 * (given.noise - explained)
        step = eqx.tree_at(lambda s: s.evidence.noise, step, noise)
    return _tell(replace(moment, step=step))


def _covariance(moment: Moment) -> Told:
    """The reported covariance is 5 % up; the filter carries on with the right one."""
    posterior, added = moment.advance()
    wrong = Belief(posterior.mean, 1.05 * posterior.covariance)
    return Told(posterior, wrong, wrong, added)


def _early_read(moment: Moment) -> Told:
    posterior, added = moment.advance()
    return Told(posterior, posterior, moment.predicted(), added)


def _transposed_decay(moment: Moment) -> Told:
    """The mean's decay per key is applied along the value axis; the covariance's is right."""

    def transposed(mean: Array) -> Array:
        memory = moment.exact.memory(mean)
        return ravel_pytree(memory.T)[0][moment.exact.partition.states]

    right = moment.predicted()
    turned = transposed(moment.belief.mean) @ moment.step.transition.mT
    wrong = transposed(turned) + moment.step.shift
    if moment.step.observation is not None:
        return _tell(moment.after(Belief(wrong, right.covariance)))
    posterior, added = moment.advance()
    posterior = Belief(posterior.mean + wrong - right.mean, posterior.covariance)
    return Told(posterior, posterior, posterior, added)


def _raw_key(moment: Moment) -> Told:
    """The filter of a model with unit keys uses the keys as they come."""
    norm = jnp.linalg.norm(moment.u["key"])
    step, observed = moment.step, moment.observed
    if step.observation is not None:
        matrix = norm * step.observation.observation
        step = eqx.tree_at(lambda s: s.observation.observation, step, matrix)
    if step.evidence is not None:
        observed = Observed(norm * observed.evidence, observed.observation)
    return _tell(replace(moment, step=step, observed=observed))


def _tell(moment: Moment) -> Told:
    posterior, added = moment.advance()
    return Told(posterior, posterior, posterior, added)


def _always(case: Case, exact: ExactFilter) -> bool:
    return True


def _keeps_covariance(case: Case, exact: ExactFilter) -> bool:
    return not isinstance(case.policy, Reset)


def _decays(case: Case, exact: ExactFilter) -> bool:
    return exact.structure.transition != "identity"


def _drifts(case: Case, exact: ExactFilter) -> bool:
    return exact.structure.drift != "zero" and _keeps_covariance(case, exact)


def _decays_entry_by_entry(case: Case, exact: ExactFilter) -> bool:
    step = exact.coefficients({name: array[0] for name, array in exact.examples.items()})
    return bool(jnp.ptp(jnp.diagonal(step.transition, axis1=-2, axis2=-1)) > 0)


FAULTS = (
    Fault("covariance reset", _keeps_covariance, _reset),
    Fault("gain 5 % up", _always, _gain),
    Fault("no drift", _drifts, _no_drift),
    Fault("decay after the write", _decays, _late_decay),
    Fault("noise 5 % up", _always, _noise),
    Fault("covariance 5 % up", _always, _covariance),
    Fault("read-out before the write", _always, _early_read),
    Fault("decay transposed", _decays_entry_by_entry, _transposed_decay),
    Fault("key not normalised", lambda case, exact: case.unit_keys, _raw_key),
)


def faults_of(case: Case, exact: ExactFilter) -> list[Fault]:
    """The faults that a case can have."""
    return [fault for fault in FAULTS if fault.applies(case, exact)]


class Claims:
    """The filter of a case as derived ("none") and with each of some faults, compiled together."""

    def __init__(self, case: Case, exact: ExactFilter, faults: Sequence[Fault]) -> None:
        claims = {"none": claimant(exact, case.policy)} | {
            fault.name: faulty(fault, exact, case.policy) for fault in faults
        }
        self.names = tuple(claims)
        self.say = jax.jit(
            lambda inputs, seen: {name: claim(inputs, seen) for name, claim in claims.items()}
        )
        self.say_last = jax.jit(
            lambda inputs, seen: {
                name: simulation.last_beliefs(claim, inputs, seen) for name, claim in claims.items()
            }
        )


class Bench:
    """The oracles of one case: each judges several claims about one scene."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.conditioner = joint.conditioner(case.model)
        self.simulate = simulation.simulator(case.model)
        self.sample = nuts.sampler(case.model)

    def joint(self, claims: Claims, scene: Scene) -> dict[str, list[Check]]:
        """Checks by joint conditioning."""
        exact = {
            length: self.conditioner(
                {name: array[:length] for name, array in scene.inputs.items()}, scene.seen[:length]
            )
            for length in sorted({1, len(scene.seen)})
        }
        said = claims.say(scene.inputs, scene.seen)
        return {name: joint.compare(claim, exact) for name, claim in said.items()}

    def simulation(self, claims: Claims, scene: Scene) -> dict[str, list[Check]]:
        """Checks by simulation."""
        truth = self.simulate(scene.inputs, scene.seed + 4)
        said = claims.say_last(scene.inputs, truth.seen)
        return {name: simulation.compare(last, truth) for name, last in said.items()}

    def nuts(self, claims: Claims, scene: Scene) -> dict[str, list[Check]]:
        """Checks by NUTS."""
        seen = nuts.AMPLIFICATION * scene.seen
        posterior = self.sample(scene.inputs, seen, scene.seed + 5)
        said = claims.say(scene.inputs, seen)
        return {name: nuts.compare(claim, posterior) for name, claim in said.items()}

    def textbook(self, claims: Claims, scene: Scene) -> dict[str, list[Check]]:
        """Checks by the textbook recurrence of a reduction."""
        right = textbook.recursion(
            self.case.model, self.case.policy, scene.inputs, np.asarray(scene.seen)
        )
        said = claims.say(scene.inputs, scene.seen)
        return {name: textbook.compare(claim, right) for name, claim in said.items()}


def failed(checks: list[Check]) -> bool:
    """Whether any check does not hold."""
    return not all(check.holds for check in checks)
