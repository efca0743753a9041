"""What a head does with its uncertainty: the policies of design models, and two of layers' own."""

from dataclasses import dataclass

import equinox as eqx
from jaxtyping import Array, Float

from design_models.policy import Diagonal as Diagonal
from design_models.policy import Exact as Exact
from design_models.policy import Forget as Forget
from design_models.policy import Isotropic as Isotropic
from design_models.policy import Reset as Reset


class Restored(eqx.Module):
    r"""Between reset and exact.

    $$ P^- = \lambda\,(\mathrm{diag}(a)P\,\mathrm{diag}(a) + q) + (1-\lambda)\,\sigma^2 I $$

    Args:
        restoration: λ in [0, 1], one number or one a token; 0 is `Reset`, 1 is `Exact`.
        variance: σ², one number or one a token.
    """

    restoration: Float[Array, "*time"]
    variance: Float[Array, "*once_or_time"] | float = 1.0


@dataclass(frozen=True)
class Additive:
    r"""Design model B: evidence about writes; without drift they are taken as certain.

    $$ M = M\,\mathrm{diag}(a) + v k^\top,\quad P = a^2 P + q r/(q + r) $$
    """


Rule = Exact | Reset | Forget | Diagonal | Isotropic | Restored | Additive
