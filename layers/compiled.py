"""Certified filters as memories: the fast form where the structure allows, else the general one."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from design_models import DesignModel
from design_models.policy import Exact, Forget, Policy
from inference.certificate import Certificate
from inference.derivation import widen
from inference.exact_filter import ExactFilter
from inference.linear_gaussian import Belief as BlockBelief
from inference.oracles import joint, nuts, simulation

from .coefficients import coefficients, why_not
from .general import general_scan
from .memory import Prediction, document_starts, without_padding
from .precision import LARGEST_RATIO
from .rules import Diagonal, Isotropic, Reset
from .scans import Algorithm, filter_scan
from .stream import Belief, Stream

_AT_ONCE = 128  # tokens whose coefficients are found together


def compile_filter(
    certificate: Certificate,
    model: DesignModel | None = None,
    *,
    algorithm: Algorithm | None = None,
) -> "RegressionMemory | GeneralMemory":
    """Compile a verified filter into a memory for one head.

    Args:
        certificate: what `inference.verify` returned.
        model: the same design model at the widths wanted, which is certified at that size; the
            verified one where left out.
        algorithm: how sequences are computed; the fastest that the structure allows where left
            out.

    Returns:
        A memory over the model's own inputs: `memory(u, memory.init_state())`. `memory.why` says
        why it is the general form, where it is.

    Raises:
        TypeError: `certificate` is not a certificate.
        ValueError: a check of it does not hold, or an oracle is missing; or the algorithm does
            not apply.
        NotLinearGaussian: the wider model is refused, or has another structure.
    """
    exact = _verified(certificate, model)
    policy = certificate.policy
    reason = why_not(exact)
    if not reason:
        return RegressionMemory(exact, policy, algorithm or "chunked")
    if algorithm == "chunked":
        raise ValueError(f'`algorithm` is "chunked", which does not apply: {reason}.')
    if algorithm == "parallel" and not isinstance(policy, Exact):
        raise ValueError(
            f'`algorithm` is "parallel", which takes the exact policy here, not {policy}: {reason}.'
        )
    return GeneralMemory(exact, policy, algorithm or "token", reason)


def _verified(certificate: Certificate, model: DesignModel | None) -> ExactFilter:
    if not isinstance(certificate, Certificate):
        raise TypeError(
            f"`certificate` is a {type(certificate).__name__}; pass what `inference.verify` returns"
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


class RegressionMemory(eqx.Module):
    """A memory whose rows share one covariance, and whose keys decay and drift one by one."""

    exact: ExactFilter = eqx.field(static=True)
    policy: Policy = eqx.field(static=True)
    algorithm: Algorithm = eqx.field(static=True)
    why: str = eqx.field(static=True, default="")

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape[1:] for name, array in self.exact.examples.items()}

    @property
    def value_width(self) -> int:
        return self.exact.partition.rows

    def init_state(self) -> Belief:
        """The prior, as the policy keeps it."""
        covariance = self.exact.initial().covariance[0]
        mean = jnp.zeros((self.value_width, len(covariance)), covariance.dtype)
        match self.policy:
            case Reset():
                return Belief(mean, None)
            case Diagonal():
                return Belief(mean, jnp.diagonal(covariance))
            case Isotropic():
                return Belief(mean, jnp.mean(jnp.diagonal(covariance)))
            case _:
                return Belief(mean, covariance)

    def __call__(self, u, state, *, segment_ids=None, mask=None):
        prior = self.exact.initial().covariance[0]
        starts = None if segment_ids is None else document_starts(segment_ids)
        return self._run(u, state, prior, starts, mask, self.algorithm)

    def step(self, u, state):
        now = {name: array[None] for name, array in u.items()}
        prior = self.exact.initial().covariance[0]
        prediction, state = self._run(now, state, prior, None, None, "token")
        return jax.tree.map(lambda part: part[0], prediction), state

    def _run(self, u, state, prior, starts, mask, algorithm) -> tuple[Prediction, Belief]:
        find = jax.checkpoint(lambda u: coefficients(self.exact, u))
        found = jax.lax.map(find, dict(u), batch_size=_AT_ONCE)
        noise = _in_range(found.noise, found.key, prior)
        # A memory that is mirrored in some keys at every token is one that is read mirrored.
        mirror = jnp.cumprod(jnp.where(found.decay < 0, -1.0, 1.0), axis=0)
        size = jnp.maximum(jnp.abs(found.decay), jnp.finfo(found.decay.dtype).tiny ** 0.5)
        rate = u.get(self.policy.rate) if isinstance(self.policy, Forget) else None
        stream = Stream(
            found.key * mirror[:, None],
            found.value,
            found.query * mirror,
            noise,
            None if self._moves == "identity" else jnp.log(size),
            None if self.exact.structure.drift == "zero" else found.drift,
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
        variance = jnp.diagonal(prior)
        state, reading = filter_scan(
            stream, variance, self.policy, initial=state, algorithm=algorithm
        )
        if self._moves != "identity" and len(mirror):
            state = _mirrored(state, mirror[-1])
        sure = reading.variance + found.output_noise
        return Prediction(
            reading.mean, reading.variance, sure + found.noise[:, -1], reading.log_evidence
        ), state

    @property
    def _moves(self) -> str:
        return self.exact.structure.transition


def _in_range(noise, key, prior) -> Float[Array, "time observation"]:
    """Refuse noise that is not positive, or too small for a float32 covariance."""
    squares = jnp.sum(key**2, axis=-1)
    noise = eqx.error_if(noise, noise <= 0, "a memory's noise variance is not positive")
    if noise.dtype == jnp.float64:
        return noise
    return eqx.error_if(
        noise,
        jnp.max(jnp.diagonal(prior)) * squares > LARGEST_RATIO * noise,
        f"prior variance × ‖key‖² / noise exceeds {LARGEST_RATIO:g}, where float32 loses the "
        "covariance; raise `noise`, or enable float64",
    )


def _mirrored(state: Belief, mirror: Float[Array, " key"]) -> Belief:
    covariance = state.covariance
    if covariance is not None and covariance.ndim == 2:
        covariance = mirror[:, None] * covariance * mirror
    return Belief(state.mean * mirror, covariance)


class GeneralMemory(eqx.Module):
    """Any verified filter, in the blocks that its structure has.

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
        starts = None if segment_ids is None else document_starts(segment_ids)
        state, reads, evidence = general_scan(
            self.exact, self.policy, u, state, starts, mask, self.algorithm
        )
        return Prediction(reads.mean, reads.variance, reads.variance, evidence), state

    def step(self, u, state):
        now = {name: array[None] for name, array in u.items()}
        state, reads, evidence = general_scan(
            self.exact, self.policy, now, state, None, None, "token"
        )
        prediction = Prediction(reads.mean, reads.variance, reads.variance, evidence)
        return jax.tree.map(lambda part: part[0], prediction), state
