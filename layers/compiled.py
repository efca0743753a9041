"""Certified filters as memories: the fast form where the structure allows, else the general one."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from design_models import DesignModel
from design_models.policy import Exact, Forget, Policy
from inference.certificate import Certificate
from inference.derivation import widen
from inference.exact_filter import ExactFilter
from inference.linear_gaussian import Belief as BlockBelief
from inference.oracles import joint, nuts, simulation
from inference.structure import MatrixKind

from .coefficients import TOLERANCE, coefficients, why_not
from .entries import Entries, entry_scan
from .general import general_scan
from .grid import cells, increments, not_cells, not_increments, prior_variances, rows_of
from .kernels import refusal
from .memory import Prediction, silent_at_padding
from .packing import at_padding, at_tokens, document_starts, without_padding
from .precision import in_range
from .rules import Additive, Diagonal, Isotropic, Reset
from .scans import Algorithm, filter_scan, initial_belief
from .stream import Belief, Stream

_AT_ONCE = 128  # tokens whose coefficients are found together


def compile_filter(
    certificate: Certificate,
    model: DesignModel | None = None,
    *,
    algorithm: Algorithm | None = None,
) -> "KeyedMemory | CellMemory | GeneralMemory":
    """Compile a verified filter into a memory for one head.

    Args:
        certificate: what `inference.verify` returned.
        model: the same design model at the widths wanted, which is certified at that size; the
            verified one where left out.
        algorithm: how sequences are computed; the fastest that the structure allows where left
            out.

    Returns:
        A memory over the model's own inputs: `memory(u, memory.init_state())`. `memory.why` says
        why it is the general form, where it is, and `memory.backend` what programs run it.

    Raises:
        TypeError: `certificate` is not a certificate.
        ValueError: a check of it does not hold, or an oracle is missing; or the algorithm does
            not apply.
        NotLinearGaussian: the wider model is refused, or has another structure.
    """
    exact = _verified(certificate, model)
    policy = certificate.policy
    reason = why_not(exact) or _policy_needs_more(exact, policy)
    if not reason:
        return _keyed(exact, policy, algorithm)
    superposes = exact.structure.kind != "shared rows" and "chunked" in exact.structure.paths
    if superposes and isinstance(policy, Exact):
        reason = not_increments(exact)
        if not reason:
            return KeyedMemory(exact, Additive(), algorithm or "chunked")
    elif algorithm is None and isinstance(policy, Exact | Reset) and not not_cells(exact):
        return CellMemory(exact, policy)
    if algorithm == "chunked":
        raise ValueError(f'`algorithm` is "chunked", which does not apply: {reason}.')
    if algorithm == "parallel" and not isinstance(policy, Exact):
        raise ValueError(
            f'`algorithm` is "parallel", which takes the exact policy here, not {policy}: {reason}.'
        )
    return GeneralMemory(exact, policy, algorithm or _general_algorithm(policy), reason)


def _general_algorithm(policy: Policy) -> Algorithm:
    """In parallel where a device has the room for it, and the policy lets tokens be combined."""
    parallel = isinstance(policy, Exact) and jax.default_backend() != "cpu"
    return "parallel" if parallel else "token"


def _verified(certificate: Certificate, model: DesignModel | None) -> ExactFilter:
    if not isinstance(certificate, Certificate):
        raise TypeError(
            f"`certificate` is of type {type(certificate).__name__}; "
            "pass what `inference.verify` returns"
        )
    oracles = {check.oracle for check in certificate.checks}
    missing = {joint.ORACLE, nuts.ORACLE, simulation.ORACLE} - oracles
    if missing or not certificate.holds:
        failed = [f"{check.oracle} {check.quantity}" for check in certificate.failures()]
        why = f"these checks failed: {failed}" if failed else f"not judged by {sorted(missing)}"
        raise ValueError(f"`certificate` of {certificate.name!r} does not hold ({why}).")
    if model is None:
        return certificate.exact_filter
    return widen(certificate.exact_filter, model)


def _keyed(exact: ExactFilter, policy: Policy, algorithm: Algorithm | None) -> "KeyedMemory":
    structure = exact.structure
    moves = structure.transition != "identity" or structure.drift != "zero"
    if not (isinstance(policy, Forget) and moves):
        alike = bool(np.ptp(_prior_variances(exact)) <= TOLERANCE)
        return KeyedMemory(exact, policy, algorithm or "chunked", alike=alike)
    why = "the evidence of a memory that decays or drifts is forgotten token by token"
    if algorithm not in (None, "token"):
        raise ValueError(f"`algorithm` is {algorithm!r}, which does not apply: {why}.")
    return KeyedMemory(exact, policy, "token", why)


def _policy_needs_more(exact: ExactFilter, policy: Policy) -> str:
    """Why a policy's fast form does not apply to this regression memory; "" where it does."""
    if isinstance(policy, Diagonal | Isotropic) and exact.structure.observations > 1:
        return f"a token has several observations, which {policy} absorbs together"
    if isinstance(policy, Isotropic) and np.ptp(_prior_variances(exact)) > TOLERANCE:
        return "keys differ in their prior variance, and one variance is kept"
    return ""


def _prior_variances(exact: ExactFilter) -> np.ndarray:
    return np.asarray(jnp.diagonal(exact.initial().covariance[0]))


class KeyedMemory(eqx.Module):
    """A memory whose rows share one covariance, and whose keys decay and drift one by one.

    Args:
        exact: the filter.
        rule: what is done to its covariance; `Additive` where values are added, not compared.
        algorithm: how sequences are computed.
        why: why they are not computed in chunks, where they cannot be.
        alike: whether keys are known to have the same prior variance.
    """

    exact: ExactFilter = eqx.field(static=True)
    rule: Policy | Additive = eqx.field(static=True)
    algorithm: Algorithm = eqx.field(static=True)
    why: str = eqx.field(static=True, default="")
    alike: bool = eqx.field(static=True, default=False)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape[1:] for name, array in self.exact.examples.items()}

    @property
    def value_width(self) -> int:
        whole = self.exact.partition.states
        return len(rows_of(self.exact)) if isinstance(self.rule, Additive) else whole.shape[1]

    @property
    def backend(self) -> str:
        """What programs run whole sequences, in a sentence."""
        reason = self.kernel_refusal()
        if reason is None:
            return "Pallas kernels on Hopper GPUs, XLA in chunks of tokens elsewhere."
        form = "token by token" if self.algorithm == "token" else "parallel in time"
        if self.algorithm == "chunked":
            form = "in chunks of tokens"
        return f"XLA, {form}; no kernel, as {reason}."

    def kernel_refusal(self) -> str | None:
        """Why no kernel takes this memory's sequences in float32; None where one does."""
        reasons = []

        def ask(u):
            stream, _, _, prior = self._stream(u, None, None)
            state = self.init_state()
            reasons.append(refusal(stream, state, prior, self.rule, self.algorithm))

        with jax.enable_x64(False):
            jax.eval_shape(ask, {name: array[:1] for name, array in self.exact.examples.items()})
        return reasons[0]

    def init_state(self) -> Belief:
        """The prior, as the rule keeps it."""
        prior = self._prior()
        return initial_belief(self.rule, self.value_width, self._key_width, prior)

    @property
    def _key_width(self) -> int:
        states = self.exact.partition.states
        return len(rows_of(self.exact)[0]) if isinstance(self.rule, Additive) else states.shape[2]

    def _prior(self) -> Float[Array, "*key"]:
        """Variances of a row's entries, which are not correlated; one where they are alike."""
        if isinstance(self.rule, Additive):
            return prior_variances(self.exact)[0]
        variances = jnp.diagonal(self.exact.initial().covariance[0])
        return variances[0] if self.alike else variances

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        starts = None if segment_ids is None else document_starts(segment_ids, mask)
        return self._run(u, state, starts, mask, self.algorithm)

    def step(self, u, state):
        now = {name: array[None] for name, array in u.items()}
        prediction, state = self._run(now, state, None, None, "token")
        return jax.tree.map(lambda part: part[0], prediction), state

    def _stream(self, u, starts, mask):
        """What `filter_scan` takes; the coefficients; the mirror that they are seen in."""
        shapes = {name: array.shape[1:] for name, array in u.items()}
        certified = self.exact.structure.kind == "shared rows" and all(
            shapes[name] == shape for name, shape in self.inputs.items()
        )
        u, prior = at_tokens(u, self.exact.examples, mask), self._prior()
        form = increments if isinstance(self.rule, Additive) else coefficients
        find = jax.checkpoint(lambda u: form(self.exact, u))
        found = jax.lax.map(find, u, batch_size=_AT_ONCE)
        mirrored = found.decay < 0
        if mask is not None:
            mirrored = at_padding(mirrored, mask, False)
        # A memory that is mirrored in some keys at every token is one that is read mirrored.
        mirror = jnp.cumprod(jnp.where(mirrored, -1.0, 1.0), axis=0)
        size = jnp.maximum(jnp.abs(found.decay), jnp.finfo(found.decay.dtype).tiny ** 0.5)
        rate = u.get(self.rule.rate) if isinstance(self.rule, Forget) else None
        drift = self.exact.structure.drift

        def narrow(rates, kind: MatrixKind):
            """One number a token where all keys have the same."""
            return rates if kind == "diagonal" or not certified else rates[:, 0]

        stream = Stream(
            found.key * mirror[:, None],
            found.value,
            found.query * mirror,
            found.noise,
            None if self._moves == "identity" else narrow(jnp.log(size), self._moves),
            None if drift == "zero" else narrow(found.drift, drift),
            starts,
            rate,
        )
        if found.key.shape[1] == 1:
            stream = eqx.tree_at(
                lambda s: (s.key, s.value, s.noise),
                stream,
                (stream.key[:, 0], stream.value[:, 0], stream.noise[:, 0]),
            )
        if mask is not None:
            stream = without_padding(stream, mask)
        if not isinstance(self.rule, Additive):  # whose noise only widens what is said
            stream = _checked(stream, prior if isinstance(self.rule, Exact | Forget) else None)
        return stream, found, mirror, prior

    def _run(self, u, state, starts, mask, algorithm) -> tuple[Prediction, Belief]:
        stream, found, mirror, prior = self._stream(u, starts, mask)
        state, reading = filter_scan(stream, prior, self.rule, initial=state, algorithm=algorithm)
        if self._moves != "identity" and len(mirror):
            state = _mirrored(state, mirror[-1])
        unsure = reading.variance + found.output_noise
        new, evidence = unsure + found.noise[:, -1], reading.log_evidence
        if found.log_evidence is not None:
            new, evidence = unsure, found.log_evidence
        prediction = Prediction(reading.mean, unsure, new, evidence)
        return silent_at_padding(prediction, mask), state

    @property
    def _moves(self) -> MatrixKind:
        return self.exact.structure.transition


def _checked(stream: Stream, prior: Float[Array, "*key"] | None) -> Stream:
    """Refuse noise that is not positive, or too small for a float32 covariance."""
    noise = eqx.error_if(stream.noise, stream.noise <= 0, "the model's noise is not positive")
    if prior is not None:
        largest = jnp.max(prior)
        noise = in_range(noise, largest * jnp.sum(stream.key**2, axis=-1))
    return replace(stream, noise=noise)


def _mirrored(state: Belief, mirror: Float[Array, " key"]) -> Belief:
    covariance = state.covariance
    if covariance is not None and covariance.ndim == 2:
        covariance = mirror[:, None] * covariance * mirror
    return Belief(state.mean * mirror, covariance)


class CellMemory(eqx.Module):
    """A memory every entry of which is filtered by itself, elementwise in blocks of tokens.

    What a new value's noise is, is not known of a row: `value_variance` is `variance`.

    Args:
        exact: the filter.
        rule: what is done to its variances.
    """

    exact: ExactFilter = eqx.field(static=True)
    rule: Exact | Reset = eqx.field(static=True)
    why: str = eqx.field(static=True, default="")

    @property
    def backend(self) -> str:
        """What programs run whole sequences, in a sentence."""
        return "XLA, in blocks of tokens; no kernel, as every entry is filtered by itself."

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape[1:] for name, array in self.exact.examples.items()}

    @property
    def value_width(self) -> int:
        return len(rows_of(self.exact))

    def init_state(self) -> Belief:
        prior = prior_variances(self.exact)
        return Belief(jnp.zeros_like(prior), None if isinstance(self.rule, Reset) else prior)

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        u = at_tokens(u, self.exact.examples, mask)
        find = jax.checkpoint(lambda u: cells(self.exact, u))
        found = jax.lax.map(find, u, batch_size=_AT_ONCE)
        starts = None if segment_ids is None else document_starts(segment_ids, mask)
        entries = Entries(
            found.key, found.value, found.query, found.noise, found.decay, found.drift, starts
        )
        prior = prior_variances(self.exact)
        prediction, state = entry_scan(entries, state, prior, self.rule, mask)
        unsure = prediction.variance + found.output_noise[:, None]
        prediction = Prediction(prediction.mean, unsure, unsure, prediction.log_evidence)
        return silent_at_padding(prediction, mask), state

    def step(self, u, state):
        prediction, state = self({name: array[None] for name, array in u.items()}, state)
        return jax.tree.map(lambda part: part[0], prediction), state


class GeneralMemory(eqx.Module):
    """Any verified filter, in the blocks that its structure has.

    What a new value's noise is, is not known of a model in general: `value_variance` is `variance`.

    Args:
        exact: the filter.
        policy: what is done to its covariance.
        algorithm: "token", or "parallel" in time under the exact policy.
        why: why no faster form applies.
    """

    exact: ExactFilter = eqx.field(static=True)
    policy: Policy = eqx.field(static=True)
    algorithm: Algorithm = eqx.field(static=True)
    why: str = eqx.field(static=True)

    @property
    def backend(self) -> str:
        """What programs run whole sequences, in a sentence."""
        form = "parallel in time" if self.algorithm == "parallel" else "token by token"
        return f"XLA, {form}; no kernel, as {self.why}."

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape[1:] for name, array in self.exact.examples.items()}

    @property
    def value_width(self) -> int:
        """Entries of the read-out."""
        u = {name: array[0] for name, array in self.exact.examples.items()}
        return jax.eval_shape(self.exact.read, self.exact.initial(), u).mean.shape[0]

    def init_state(self) -> BlockBelief:
        return self.exact.initial()

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        starts = None if segment_ids is None else document_starts(segment_ids, mask)
        u = at_tokens(u, self.exact.examples, mask)
        state, reads, evidence = general_scan(
            self.exact, self.policy, u, state, starts, mask, self.algorithm
        )
        return Prediction(reads.mean, reads.variance, reads.variance, evidence), state

    def step(self, u, state):
        now = at_tokens({name: array[None] for name, array in u.items()}, self.exact.examples, None)
        state, reads, evidence = general_scan(
            self.exact, self.policy, now, state, None, None, "token"
        )
        prediction = Prediction(reads.mean, reads.variance, reads.variance, evidence)
        return jax.tree.map(lambda part: part[0], prediction), state
