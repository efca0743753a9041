r"""Design model B: each token is evidence about what is written, never about what is held.

The memory grows by a write of unknown content; the token's outer product is a noisy measurement
of that write alone. Nothing already held is ever corrected, so colliding keys superpose.

$$ S_t = S_{t-1}\,\mathrm{diag}(a_t) + W_t,\; W_t \sim N(0, q_t),\quad
   Z_t = W_t + E_t,\; E_t \sim N(0, r_t),\quad
   \text{observed } Z_t = v_t k_t^\top/\kappa_t,\; \kappa_t = \frac{q_t}{q_t + r_t} $$

The posterior mean of the write is κ Z. Evidence is therefore recorded in units of the posterior
mean, v kᵀ/κ: then the mean moves by exactly v kᵀ whatever the signal-to-noise ratio q/r, and
linear attention's unit write is the exact posterior mean at every noise level, not only in the
noiseless limit r → 0 in which κ → 1. The noise decides how sure the memory is, P ← a²P + κ r per
entry, and nothing else.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray

from .associative_regression import Rate, check_rate, check_widths
from .design_model import DesignModel
from .errors import ModelError


def increment_evidence(
    value_width: int,
    key_width: int,
    *,
    decay: Rate = "none",
    prior_variance: float = 1.0,
) -> DesignModel:
    """Return design model B with memory (value, key): linear attention, RetNet, GLA.

    Inputs a step: `key` (key,), `value` (value,), `query` (key,), `drift` variance of the write (),
    `noise` variance of the evidence (), and, unless "none", `decay`, () or (key,).

    Args:
        value_width: rows of the memory.
        key_width: columns of the memory.
        decay: what the memory is multiplied by before each write.
        prior_variance: variance of every entry at the start.

    Raises:
        ModelError: a width, `decay` or `prior_variance` makes no sense.
    """
    check_rate("decay", decay)

    def transition(memory, u):
        kept = memory if decay == "none" else memory * u["decay"]
        write_mean = jnp.zeros_like(memory)
        write = numpyro.sample("write", dist.Normal(write_mean, jnp.sqrt(u["drift"])).to_event(2))
        certainty = u["drift"] / (u["drift"] + u["noise"])
        numpyro.sample(
            "evidence",
            dist.Normal(write, jnp.sqrt(u["noise"])).to_event(2),
            obs=jnp.outer(u["value"], u["key"]) / certainty,
        )
        return kept + write

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        rng_decay, rng_rest = jax.random.split(rng)
        shape = (steps, key_width)
        return {
            **_common_inputs(rng_rest, steps, value_width, key_width),
            "decay": jax.random.uniform(rng_decay, shape, minval=0.7, maxval=0.99),
        }

    return DesignModel(
        _prior(value_width, key_width, prior_variance),
        transition,
        _observe_nothing,
        inputs=inputs if decay == "key" else None,
    )


def continuous_increment_evidence(
    value_width: int, key_width: int, *, prior_variance: float = 1.0
) -> DesignModel:
    r"""Return design model B in continuous time: Mamba-2, whose step size is elapsed time.

    $$ S_t = e^{-\Delta_t A_t} S_{t-1} + W_t,\; W_t \sim N(0, q_t \Delta_t),\quad
       Z_t = W_t/\Delta_t + E_t,\; E_t \sim N(0, r_t/\Delta_t),\quad
       \text{observed } Z_t = v_t k_t^\top/\kappa_t $$

    A write that accumulates at rate q is measured by its average over the elapsed time Δ, in white
    noise of intensity r. The gain is cov(W, Z)/var(Z) = q / ((q + r)/Δ) = Δκ, so the mean moves by
    Δ v kᵀ: Δ enters as the strength of the write, as in Mamba-2's discretisation
    h ← exp(−ΔA) h + Δ x Bᵀ. (Like Mamba-2's, the write is not decayed within its own step.)

    Inputs a step: `key` (key,), `value` (value,), `query` (key,), `step` Δ > 0 (), `rate` A > 0 (),
    `drift` q () and `noise` r (), both per unit of time.

    Args:
        value_width: rows of the memory.
        key_width: columns of the memory.
        prior_variance: variance of every entry at the start.

    Raises:
        ModelError: a width or `prior_variance` makes no sense.

    Source: Dao & Gu (2024), arXiv 2405.21060.
    """

    def transition(memory, u):
        write_scale = jnp.sqrt(u["drift"] * u["step"])
        write = numpyro.sample(
            "write", dist.Normal(jnp.zeros_like(memory), write_scale).to_event(2)
        )
        certainty = u["drift"] / (u["drift"] + u["noise"])
        numpyro.sample(
            "evidence",
            dist.Normal(write / u["step"], jnp.sqrt(u["noise"] / u["step"])).to_event(2),
            obs=jnp.outer(u["value"], u["key"]) / certainty,
        )
        return memory * jnp.exp(-u["step"] * u["rate"]) + write

    def inputs(rng: PRNGKeyArray, steps: int) -> dict[str, Array]:
        rng_step, rng_rate, rng_rest = jax.random.split(rng, 3)
        rate = jax.random.uniform(rng_rate, minval=0.5, maxval=2.0)
        return {
            **_common_inputs(rng_rest, steps, value_width, key_width),
            "step": jax.random.uniform(rng_step, (steps,), minval=0.05, maxval=0.5),
            "rate": jnp.full((steps,), rate),
        }

    return DesignModel(
        _prior(value_width, key_width, prior_variance), transition, _observe_nothing, inputs=inputs
    )


def _prior(value_width: int, key_width: int, prior_variance: float):
    check_widths(value_width, key_width)
    if prior_variance <= 0:
        raise ModelError(f"`prior_variance` is {prior_variance}; it must be positive.")

    def prior():
        mean = jnp.zeros((value_width, key_width))
        return numpyro.sample("memory", dist.Normal(mean, prior_variance**0.5).to_event(2))

    return prior


def _observe_nothing(memory, u):
    """All the evidence is about the write, and sits in the transition."""


def _common_inputs(
    rng: PRNGKeyArray, steps: int, value_width: int, key_width: int
) -> dict[str, Array]:
    rngs = jax.random.split(rng, 5)
    return {
        "key": jax.random.normal(rngs[0], (steps, key_width)) / key_width**0.5,
        "value": jax.random.normal(rngs[1], (steps, value_width)),
        "query": jax.random.normal(rngs[2], (steps, key_width)) / key_width**0.5,
        "drift": jax.random.uniform(rngs[3], (steps,), minval=0.05, maxval=0.3),
        "noise": jax.random.uniform(rngs[4], (steps,), minval=0.1, maxval=0.6),
    }
