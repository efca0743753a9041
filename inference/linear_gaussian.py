r"""One step of a linear-Gaussian memory, as coefficients.

The state is split into independent blocks; the rows of a block share one covariance and differ
only in their means. A (value, key) memory whose rows share one covariance is one block of `value`
rows, each `key` wide; a memory of independent entries is value*key blocks of one row, one wide; a
memory without structure is one block of one row.

    evidence about the change (observed inside `transition`), optional:
        z = x H_zᵀ + h_z + e_z,        cov(e_z) = R_z,  cov(w, e_z) = C_z
    transition:   x' = x Fᵀ + f + w,   cov(w) = Q
    observation:  y = x' Hᵀ + h + e,   cov(e) = R
"""

import equinox as eqx
from jaxtyping import Array, Float


class Observation(eqx.Module):
    """What is observed of the memory: y = x Hᵀ + h + e, cov(e) = R."""

    observation: Float[Array, "*time block seen width"]
    shift: Float[Array, "*time block row seen"]
    noise: Float[Array, "*time block seen seen"]


class Evidence(eqx.Module):
    """What is observed of the change: z = x Hᵀ + h + e, cov(e) = R, cov(w, e) = C."""

    observation: Float[Array, "*time block seen width"]
    shift: Float[Array, "*time block row seen"]
    noise: Float[Array, "*time block seen seen"]
    cross: Float[Array, "*time block width seen"]


class Step(eqx.Module):
    """Coefficients of one step; with a leading time axis, of a sequence of steps."""

    transition: Float[Array, "*time block width width"]
    shift: Float[Array, "*time block row width"]
    drift: Float[Array, "*time block width width"]
    evidence: Evidence | None
    observation: Observation | None


class Observed(eqx.Module):
    """The values that were observed, arranged like the coefficients."""

    evidence: Float[Array, "*time block row seen"] | None
    observation: Float[Array, "*time block row seen_too"] | None


class Belief(eqx.Module):
    """A Gaussian belief about the memory: rows of a block have one covariance."""

    mean: Float[Array, "*time block row width"]
    covariance: Float[Array, "*time block width width"]


class FactorBelief(eqx.Module):
    """The same belief with covariance = cholesky @ choleskyᵀ; diagonal signs are free."""

    mean: Float[Array, "*time block row width"]
    cholesky: Float[Array, "*time block width width"]

    @property
    def covariance(self) -> Float[Array, "*time block width width"]:
        return self.cholesky @ self.cholesky.mT
