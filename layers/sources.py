"""Where a mixer's named inputs come from: projections of the sequence, or numbers of each head."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .packing import document_starts

Link = Callable[[Array], Array]


def identity(array: Array) -> Array:
    """The link of an input that may be any number."""
    return array


def unit(array: Float[Array, "*time width"]) -> Float[Array, "*time width"]:
    """Vectors of length 1; a zero stays (almost) zero and has a derivative."""
    squares = jnp.sum(jnp.square(array.astype(jnp.float32)), axis=-1, keepdims=True)
    return (array * jax.lax.rsqrt(squares + 1e-6)).astype(array.dtype)


class ShortConvolution(eqx.Module):
    """Causal convolution of every channel with its own few taps, the last one newest.

    Source: as in Mamba and Gated DeltaNet (`kernel_size` 4).
    """

    taps: Float[Array, "tap channel"]

    def __init__(self, channels: int, taps: int = 4, *, rng: PRNGKeyArray) -> None:
        limit = 1 / math.sqrt(taps)
        self.taps = jax.random.uniform(rng, (taps, channels), minval=-limit, maxval=limit)

    def init_state(self) -> Float[Array, "past channel"]:
        return jnp.zeros((self.taps.shape[0] - 1, self.taps.shape[1]))

    def __call__(
        self,
        x: Float[Array, "time channel"],
        past: Float[Array, "past channel"],
        segment_ids: Int[Array, " time"] | None = None,
        mask: Bool[Array, " time"] | None = None,
    ) -> tuple[Float[Array, "time channel"], Float[Array, "past channel"]]:
        """Convolve; no tap reaches into another document. Also the inputs that later calls need."""
        count, time = self.taps.shape[0], x.shape[0]
        if mask is not None:
            x = jnp.where(mask[:, None], x, 0)
        joined = jnp.concatenate([past.astype(x.dtype), x])
        documents = None
        if segment_ids is not None and time:  # earlier inputs belong to the first document
            numbers = jnp.cumsum(document_starts(segment_ids, mask))
            documents = jnp.concatenate([jnp.zeros(count - 1, numbers.dtype), numbers])
        total = jnp.zeros_like(x)
        for tap in range(count):
            seen = joined[tap : tap + time]
            if documents is not None:
                same = documents[tap : tap + time] == documents[count - 1 :]
                seen = jnp.where(same[:, None], seen, 0)
            total = total + seen * self.taps[tap].astype(x.dtype)
        end = jnp.asarray(time)
        if mask is not None:  # the last token that is not padding
            end = jnp.max(jnp.where(mask, jnp.arange(1, time + 1), 0), initial=0)
        later = jax.lax.dynamic_slice_in_dim(joined, end, count - 1)
        if documents is not None:
            last = jax.lax.dynamic_slice_in_dim(documents, end, count - 1)
            later = jnp.where((last == last[-1])[:, None], later, 0)
        return total, later


class Projected(eqx.Module):
    """An input that is projected from the sequence: `link(convolution(x W + b))`, by head.

    Args:
        down: (d_model, rank) where the projection goes through few channels, or None.
        weight: (d_model or rank, channels), channels = source heads × the input's size.
        bias: one number per channel, or None; in the constructor one for all, or (heads, *shape).
        convolution: over time, or None.
        shape: the input's shape at one token.
        heads: heads that the mixer has.
        groups: heads that share one projection.
        link: maps (time, heads, *shape) to the range of the input.
    """

    down: Float[Array, "d_model rank"] | None
    weight: Float[Array, "source channel"]
    bias: Float[Array, " channel"] | None
    convolution: ShortConvolution | None
    link: Link
    shape: tuple[int, ...] = eqx.field(static=True)
    heads: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        heads: int,
        shape: tuple[int, ...],
        link: Link = identity,
        *,
        bias: Array | float | None = None,
        taps: int | None = None,
        groups: int = 1,
        rank: int | None = None,
        rng: PRNGKeyArray,
    ) -> None:
        if heads % groups:
            raise ValueError(f"`heads` is {heads}; it must be a multiple of `groups`, {groups}.")
        rng_down, rng_weight, rng_taps = jax.random.split(rng, 3)
        channels = heads // groups * math.prod(shape)
        self.down = None if rank is None else _scaled_normal(rng_down, (d_model, rank))
        self.weight = _scaled_normal(rng_weight, (rank or d_model, channels))
        biases = None if bias is None else jnp.asarray(bias, float).ravel()
        self.bias = None if biases is None else jnp.broadcast_to(biases, (channels,))
        self.convolution = None if taps is None else ShortConvolution(channels, taps, rng=rng_taps)
        self.link, self.shape, self.heads, self.groups = link, shape, heads, groups

    def init_state(self) -> Float[Array, "past channel"] | None:
        return None if self.convolution is None else self.convolution.init_state()

    def __call__(self, x, past, segment_ids=None, mask=None):
        source = x if self.down is None else x @ self.down.astype(x.dtype)
        projected = source @ self.weight.astype(x.dtype)
        if self.bias is not None:
            projected = projected + self.bias.astype(x.dtype)
        if self.convolution is not None:
            projected, past = self.convolution(projected, past, segment_ids, mask)
        by_head = projected.reshape(x.shape[0], self.heads // self.groups, *self.shape)
        return self.link(jnp.repeat(by_head, self.groups, axis=1)), past


class PerHead(eqx.Module):
    """An input that every head has of its own, the same at every token: `link(parameter)`."""

    parameter: Float[Array, "*heads_and_shape"]
    link: Link
    learned: bool = eqx.field(static=True, default=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape[1:]

    def init_state(self) -> None:
        return None

    def __call__(self, x, past, segment_ids=None, mask=None):
        parameter = self.parameter if self.learned else jax.lax.stop_gradient(self.parameter)
        values = self.link(parameter)
        return jnp.broadcast_to(values, (x.shape[0], *values.shape)), past


def _scaled_normal(rng: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "row column"]:
    """Normal, with variance 1/rows."""
    return jax.random.normal(rng, shape) / math.sqrt(shape[0])


class GatedDecay(eqx.Module):
    r"""A log decay, $\log a = -e^{A}\,\mathrm{softplus}(x W + b)$, A one number per head.

    Source: Gu & Dao (2023), arXiv 2312.00752; initialised as in Gated DeltaNet and KDA.
    """

    rate: Float[Array, " heads"]
    bias: Float[Array, "*heads_and_shape"]
    projection: Projected

    def __init__(
        self,
        d_model: int,
        heads: int,
        shape: tuple[int, ...] = (),
        *,
        rank: int | None = None,
        rng: PRNGKeyArray,
    ) -> None:
        rng_rate, rng_step, rng_projection = jax.random.split(rng, 3)
        self.rate = jnp.log(jax.random.uniform(rng_rate, (heads,), minval=1e-3, maxval=16.0))
        self.bias = step_bias(rng_step, (heads, *shape))
        self.projection = Projected(d_model, heads, shape, rank=rank, rng=rng_projection)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.projection.shape

    def init_state(self) -> None:
        return None

    def __call__(self, x, past, segment_ids=None, mask=None):
        logits = self.projection(x, None)[0].astype(jnp.float32) + self.bias
        rate = jnp.exp(self.rate).reshape(-1, *[1] * (self.bias.ndim - 1))
        return -rate * jax.nn.softplus(logits), past


def step_bias(rng: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Biases whose softplus is log-uniform between 0.001 and 0.1."""
    step = jnp.exp(jax.random.uniform(rng, shape, minval=math.log(1e-3), maxval=math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))
