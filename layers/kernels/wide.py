"""The gradient's recursion across chunks in XLA, for keys whose matrices a kernel cannot hold."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .blocks import ratios_within
from .forward import CHUNK
from .reverse import Numbers

_product = partial(jnp.einsum, precision="highest")


def recur(
    key: Float[Array, "row time key"],
    query: Float[Array, "row time key"],
    of_mean: Float[Array, "row time value"],
    numbers: Float[Array, "row chunk number token"],
    found: tuple[Array, ...],
    means: Float[Array, "row chunk piece_of_state value key"],
    covariances: Float[Array, "row chunk piece_of_state key key"],
    of_last_mean: Float[Array, "row value key"],
    of_last_covariance: Float[Array, "row key key"],
) -> dict[str, Array]:
    """What `reverse.recur` returns, of whole keys and queries.

    The states' cotangents at all chunks' ends come from a scan, and then everything that tokens
    are asked, linear in them, from products over all chunks at once.
    """
    rows, time, _ = key.shape
    f32, dtype = jnp.float32, key.dtype

    def by_chunk(array):
        cut = array.astype(f32).reshape(rows, time // CHUNK, CHUNK, -1)
        return jnp.swapaxes(cut, 0, 1)

    def whole(pieces):
        return jnp.swapaxes(pieces.astype(f32).sum(axis=2), 0, 1)

    keys, queries, cotangents = map(by_chunk, (key, query, of_mean))
    parts = map(whole, (*found[:3], means, covariances))
    weights, spreads, reads, mean, covariance = parts
    of_value, of_joint = (jnp.swapaxes(array, 0, 1) for array in found[3:])
    vectors = Numbers(*jnp.moveaxis(numbers, 2, 0).swapaxes(1, 2))
    ratios = ratios_within(vectors.total, vectors.document)
    alpha, drift, end, of_variance = (
        vector[..., None]
        for vector in (vectors.alpha, vectors.drift, vectors.end, vectors.of_variance)
    )
    local = keys, queries, cotangents, weights, spreads, reads, of_value, of_joint, ratios
    chunks = *local, alpha, drift, end, of_variance

    def tokens(chunk, of_mean_end, of_covariance_end):
        """What a chunk's end asks of its values, joint covariance and E, beside its readings."""
        key, query, _, weights, spreads, reads, of_value, of_joint, ratios, *_, end, _ = chunk
        guided = _product("rtv,rvk->rtk", spreads, of_mean_end)
        spread = _product("rtk,rkl->rtl", weights, of_covariance_end)
        of_value = of_value + _product("rtk,rvk->rtv", weights, of_mean_end)
        between = _product("rtk,rsk->rts", guided - spread, weights)
        between = jnp.tril(between + jnp.swapaxes(between, 1, 2))
        between = between - jnp.eye(CHUNK) * between / 2
        joint = of_joint - between * ratios
        of_tied = end * (guided - 2 * spread)
        of_tied = of_tied + _product("rts,rtk->rsk", joint, key)
        return of_value, joint, of_tied + _product("rts,rtk->rsk", reads, query)

    def through(carry, chunk):
        of_mean_end, of_covariance_end = carry
        key, query, cotangent, *_, alpha, _, _, of_variance = chunk
        of_value, _, of_tied = tokens(chunk, of_mean_end, of_covariance_end)
        kept = alpha[:, -1:]
        of_mean = kept * of_mean_end - _product("rtv,rtk->rvk", alpha * of_value, key)
        of_mean = of_mean + _product("rtv,rtk->rvk", alpha * cotangent, query)
        crossed = _product("rtk,rtl->rkl", key, alpha**2 * of_tied)
        squared = _product("rtk,rtl->rkl", query, alpha**2 * of_variance * query)
        of_covariance = kept**2 * of_covariance_end + squared
        of_covariance = of_covariance + (crossed + jnp.swapaxes(crossed, 1, 2)) / 2
        return (of_mean, of_covariance), (carry, (of_mean, of_covariance))

    last = of_last_mean, of_last_covariance
    first, (ends, starts) = jax.lax.scan(through, last, chunks, reverse=True)

    def finished(chunk, mean, covariance, of_mean_end, of_covariance_end):
        key, query, cotangent, *_, reads, _, _, _, alpha, drift, _, of_variance = chunk
        of_value, joint, of_tied = tokens(chunk, of_mean_end, of_covariance_end)
        faded = alpha**2 * of_tied
        tied = alpha**2 * _product("rtk,rkl->rtl", key, covariance) + drift * key
        unread = alpha**2 * _product("rtk,rkl->rtl", query, covariance) + drift * query
        of_key = drift * of_tied + _product("rts,rsk->rtk", joint, tied)
        of_key = of_key + _product("rtk,rkl->rtl", faded, covariance)
        of_key = of_key - _product("rtv,rvk->rtk", alpha * of_value, mean)
        of_query = 2 * of_variance * unread + _product("rts,rsk->rtk", reads, tied)
        of_query = of_query + _product("rtv,rvk->rtk", alpha * cotangent, mean)
        noise = jnp.diagonal(joint, axis1=1, axis2=2)
        of_drift = jnp.sum(key * of_tied + of_variance * query**2, axis=-1)
        moved = jnp.sum(key * of_key + query * of_query, axis=-1)
        return of_key, of_value, of_query, noise, of_drift, moved

    of_tokens = jax.vmap(finished)(chunks, mean, covariance, *ends)
    of_key, of_value, of_query, noise, of_drift, moved = (
        jnp.swapaxes(array, 0, 1).reshape(rows, time, *array.shape[3:]) for array in of_tokens
    )
    of_means, of_covariances = starts
    scale = jnp.sum(mean * of_means, axis=-2) + 2 * jnp.sum(covariance * of_covariances, axis=-2)
    return {
        "key": of_key.astype(dtype),
        "value": of_value.astype(dtype),
        "query": of_query.astype(dtype),
        "noise": noise,
        "drift": of_drift,
        "moved": moved,
        "trace": jnp.swapaxes(jnp.diagonal(of_covariances, axis1=2, axis2=3), 0, 1),
        "scale": jnp.swapaxes(scale, 0, 1),
        "first_mean": first[0],
        "first_covariance": first[1],
    }
