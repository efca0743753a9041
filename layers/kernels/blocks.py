"""What a token's decay, drift and document amount to within its block of 16."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .mosaic import BLOCK

SMALLEST_LOG_DECAY = -100.0
"""Below it a decay is 0 in float32."""
SMALLEST_LOG_KEPT = -20.0
"""Below it a restoration keeps nothing that float32 would notice beside what it adds."""

Numbers = Float[Array, "*row time"]


class Rates(NamedTuple):
    """Numbers a token, of the block of 16 to which it belongs.

    Args:
        noise: r.
        alpha: decay since the block's start; 0 once a document has started.
        drift: c, variance added since the block's start.
        end: decay to the block's end; 0 where a document starts between.
        decay: a; 0 where a document starts.
        ratios: decay from each of the block's 16 tokens to this one, 0 from later ones.
        kept: λ, how much of a predicted covariance a restoration keeps; None where it keeps all.
            `alpha`, `end` and `ratios` are of the mean then, `decay` is λ a.
        faded: log λ, summed since the block's start.
    """

    noise: Numbers
    alpha: Numbers
    drift: Numbers
    end: Numbers
    decay: Numbers
    ratios: Float[Array, "*row time 16"]
    kept: Numbers | None = None
    faded: Numbers | None = None

    def given(self) -> tuple[Array, ...]:
        """Those that there are."""
        return tuple(part for part in self if part is not None)


def rates(
    noise: Numbers,
    log_decay: Numbers,
    starts: Bool[Array, "*row time"],
    added: Numbers,
    kept: Numbers | None = None,
) -> Rates:
    """Rates of tokens whose number is a multiple of 16.

    Ratios are exponentials of differences of sums of log decays: over 16 tokens, each at least
    `SMALLEST_LOG_DECAY`, these differences lose less than 1e-4 of a ratio that is not 0.

    Args:
        noise: r.
        log_decay: of memory and standard deviation alike.
        starts: where documents start.
        added: variance before the write: q, or all of it where a document starts.
        kept: λ of a restoration; None for 1.
    """
    log_decay = unknown(log_decay)
    total, document = sums(log_decay, starts, BLOCK)
    ratios = ratios_within(total, document)
    alpha = jnp.where(document == 0, jnp.exp(total), 0)
    decay = jnp.where(starts, 0, jnp.exp(log_decay))
    squared, shape = ratios**2, noise.shape
    restored = ()
    if kept is not None:
        faded = kept_sums(kept, BLOCK)
        squared, decay = squared * kept_within(faded), decay * kept
        restored = kept, faded.reshape(shape)
    drift = jnp.sum(squared * added.reshape(total.shape)[..., None, :], axis=-1)
    return Rates(
        noise,
        alpha.reshape(shape),
        drift.reshape(shape),
        ratios[..., -1, :].reshape(shape),
        decay,
        ratios.reshape(*shape, BLOCK),
        *restored,
    )


def drift_since(given: Rates, length: int) -> Numbers:
    """Variance added since the start of each part of the sequence, from that since its blocks'.

    Args:
        given: rates.
        length: tokens of a part, whole blocks.
    """
    drift, fade = (_by_block(array, length) for array in (given.drift, _since(given)))
    before = [jnp.zeros_like(drift[..., 0, 0])]
    for block in range(length // BLOCK - 1):
        before.append(drift[..., block, -1] + fade[..., block, -1] * before[-1])
    return (drift + fade * jnp.stack(before, axis=-1)[..., None]).reshape(given.drift.shape)


def of_added(
    given: Rates, of_drift: Float[Array, "*row part token"]
) -> Float[Array, "*row part token"]:
    r"""Cotangents of the variance added before each token, $\sum_{u \ge t} \rho_{ut}^2 \bar c_u$.

    Sums are of a block of 16, and of what later blocks of the part ask of its end: a quarter of
    the ratios that all pairs of 64 tokens have.

    Args:
        given: rates.
        of_drift: c̄, cotangents of what `drift_since` finds.
    """
    length = of_drift.shape[-1]
    ratios = given.ratios.reshape(*of_drift.shape[:-1], length // BLOCK, BLOCK, BLOCK)
    squared, until = ratios**2, _by_block(given.end, length) ** 2
    if given.faded is not None:
        faded = _by_block(given.faded, length)
        squared = squared * kept_within(faded)
        until = until * jnp.exp(faded[..., -1:] - faded)
    asked, fade = of_drift.reshape(until.shape), _by_block(_since(given), length)
    entering = jnp.sum(asked * fade, axis=-1)
    later = [jnp.zeros_like(entering[..., 0])]
    for block in reversed(range(1, length // BLOCK)):
        later.append(entering[..., block] + fade[..., block, -1] * later[-1])
    after = jnp.stack(later[::-1], axis=-1)[..., None]
    found = jnp.sum(asked[..., None] * squared, axis=-2) + until * after
    return found.reshape(of_drift.shape)


def _by_block(array: Numbers, length: int) -> Float[Array, "*row part block token"]:
    return array.reshape(*array.shape[:-1], -1, length // BLOCK, BLOCK)


def _since(given: Rates) -> Numbers:
    """Decay of the covariance since the block's start."""
    fade = given.alpha**2
    return fade if given.faded is None else fade * jnp.exp(given.faded)


def sums(
    log_decay: Numbers, starts: Bool[Array, "*row time"], length: int
) -> tuple[Float[Array, "*row part token"], Float[Array, "*row part token"]]:
    """Log decay since the start of each part of the sequence, and documents started since.

    A document's first token has log decay 0: its own decay acts on the prior.

    Args:
        log_decay: `unknown`.
        starts: where documents start.
        length: tokens of a part.
    """
    shape = (*log_decay.shape[:-1], -1, length)
    steps = jnp.maximum(jnp.where(starts, 0, log_decay), SMALLEST_LOG_DECAY)
    return jnp.cumsum(steps.reshape(shape), axis=-1), started(starts.reshape(shape))


def started(starts: Bool[Array, "*row part token"]) -> Float[Array, "*row part token"]:
    """Documents started since the start of each part, as a sum that is 0 at once where none do."""
    length = starts.shape[-1]
    earlier = jnp.tril(jnp.ones((length, length), bool))
    return jnp.sum(jnp.where(earlier & starts[..., None, :], jnp.float32(1), 0), axis=-1)


def unknown(rate: Array) -> Array:
    """The same, which the compiler may not know.

    Of a rate that is left out, or one for all tokens, XLA would find the cumulative sums while it
    compiles, and takes half a minute to.
    """
    return lax.optimization_barrier(rate)


def ratios_within(
    total: Float[Array, "*row part token"], document: Float[Array, "*row part token"]
) -> Float[Array, "*row part token token"]:
    """Decay from token s to token t of each part; 0 for s > t and from another document."""
    same = document[..., :, None] == document[..., None, :]
    length = total.shape[-1]
    allowed = same & jnp.tril(jnp.ones((length, length), bool))
    between = total[..., :, None] - total[..., None, :]
    return jnp.exp(jnp.where(allowed, between, -jnp.inf))


def kept_sums(kept: Numbers, length: int) -> Float[Array, "*row part token"]:
    """Log λ summed since the start of each part of the sequence."""
    steps = jnp.maximum(jnp.log(unknown(kept)), SMALLEST_LOG_KEPT)
    return jnp.cumsum(steps.reshape(*kept.shape[:-1], -1, length), axis=-1)


def kept_within(
    faded: Float[Array, "*row part token"],
) -> Float[Array, "*row part token token"]:
    """Product of λ over the tokens after s, up to t, of each part; 1 for s > t."""
    between = faded[..., :, None] - faded[..., None, :]
    return jnp.exp(jnp.minimum(between, 0))
