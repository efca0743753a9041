"""Covariance policies: what is done to the belief before each write.

A recurrence is a design model and one of these. `Exact` is the model's own filter; every other
policy is a reduction of it, which keeps the design model's decay of the mean but replaces its
uncertainty. They hold data only; `inference` applies them.
"""

from dataclasses import dataclass

from .errors import ModelError


@dataclass(frozen=True)
class Exact:
    r"""Keep the filter's own covariance: $P^- = \mathrm{diag}(a) P \mathrm{diag}(a) + q$."""


@dataclass(frozen=True)
class Reset:
    r"""Forget the covariance before each observation: $P^- = \sigma^2 I$.

    Where a step holds several observations it is reset before every one of them, in their order.
    With design model A the gain is β k, β = σ²/(σ²‖k‖² + r): the delta rule. Then β‖k‖² < 1; the
    reflections that some delta-rule layers allow (β up to 2 for unit keys) have no noise variance.

    Args:
        variance: σ².

    Raises:
        ModelError: `variance` is not positive.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ModelError(f"`variance` of Reset is {self.variance}; it must be positive.")


@dataclass(frozen=True)
class Forget:
    r"""Fade the evidence: $\Lambda^- = \gamma\Lambda + (1-\gamma)\Lambda_0$, η alike.

    Λ is the precision, η = Λ·mean, Λ₀ and η₀ those of the prior: before the write of step t, the
    predicted belief is pulled towards the prior in natural parameters.

    Args:
        rate: the name of the input that holds γ_t, in (0, 1], one number a step.
    """

    rate: str = "forget"


@dataclass(frozen=True)
class Diagonal:
    r"""Keep one variance per key: $\hat p = a^2 p + q,\; 1/p = 1/\hat p + c\,k^2/r$.

    The gain is p̂∘k/(r + Σ p̂ k²). With c = 1, 1/p is the diagonal of the posterior precision; with
    any other count each token's information is counted c times, which no projection of the exact
    covariance does.

    Args:
        count: c; None means the key width, as Kalman Delta Networks are shipped.

    Raises:
        ModelError: `count` is not positive.
    """

    count: float | None = None

    def __post_init__(self) -> None:
        _check_count(self)


@dataclass(frozen=True)
class Isotropic:
    r"""Keep one variance: $\hat b = \overline{a^2} b + \bar q,\; 1/b = 1/\hat b + c\|k\|^2/(K r)$.

    The bar is the mean over the K keys. The gain is b̂ k/(r + b̂‖k‖²).

    Args:
        count: c; None means the key width K, as Kalman Delta Networks are shipped.

    Raises:
        ModelError: `count` is not positive.
    """

    count: float | None = None

    def __post_init__(self) -> None:
        _check_count(self)


def _check_count(policy: Diagonal | Isotropic) -> None:
    if policy.count is not None and not policy.count > 0:
        raise ModelError(
            f"`count` of {type(policy).__name__} is {policy.count}; "
            "it must be positive, or None for the key width."
        )


Policy = Exact | Reset | Forget | Diagonal | Isotropic
