r"""One head of the filter with rates per key, by kernels, and its gradient.

In the notation of `kernels.reverse`, a chunk of 64 tokens is made of its states and rates by
bilinear forms alone: G and A, the joint covariances of values with values and with read-outs,
F = ε∘E, and the means that are expected. What the forward pass has left, u, w and √s, gives the
factor without another factorisation,

$$ L_{ts} = k_t^\top \mathrm{diag}(\rho_{ts}) u_s,\quad
   R_{ts} = x_t^\top \mathrm{diag}(\rho_{ts}) u_s $$

(`keywise_ratios.factors`), with which `local` finds what is asked of each chunk by itself, and
`keywise_reverse.recur` passes through them. Ratios enter again in the chunk's own drift alone
(`keywise_drift.of_drift`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .head import Filtered, Head, over_rows
from .keywise import decays, filter_keywise
from .keywise_drift import of_drift
from .keywise_ratios import factors, prepare
from .keywise_reverse import recur
from .local import local_of_factors
from .matrices import Numbers


def filter_keywise_head(head: Head, values: int, interpret: bool = False) -> Filtered:
    """Filter one head of 64 keys and values, of which `values` are seen, in float32."""
    filtered: Any = _filter_head(head, values, interpret)
    return filtered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _filter_head(head: Head, values: int, interpret: bool) -> Filtered:
    return _run(head, values, interpret, False)[0]


# A program of its own, so that layers that are alike share their kernels: each is lowered once.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _run(head: Head, values: int, interpret: bool, save: bool):
    def rows(number: int, head: Head):
        tokens = jnp.stack([head.key, head.query], axis=1)
        decay = decays(head.log_decay, head.starts)
        prepared = prepare(tokens, decay, head.added, interpret=interpret)
        given = decay, head.value, head.noise, head.covariance, head.mean
        return filter_keywise(prepared, *given, save=save, interpret=interpret)

    found = over_rows(rows)(head)
    surprise = found["whitened"][:, head.key.shape[-1] :]
    log_scale = jnp.log(found["inverse_deviation"]) - 0.5 * jnp.log(2 * jnp.pi)
    evidence = values * log_scale - 0.5 * jnp.sum(surprise**2, axis=-1)
    last = found["last_covariance"], found["last_mean"]
    return Filtered(found["mean"], found["variance"], evidence, *last), found


def _forward(head: Head, values: int, interpret: bool):
    out, found = _run(head, values, interpret, True)
    kept = {name: found[name] for name in ("whitened", "inverse_deviation", "covariances", "means")}
    return out, (head, kept, out.last_covariance, out.last_mean)


@partial(jax.jit, static_argnums=(0, 1))
def _backward(values: int, interpret: bool, residuals, of: Filtered):
    head, kept, last_covariance, last_mean = residuals
    of_last_covariance = (of.last_covariance + of.last_covariance.T) / 2
    given = {
        **kept,
        "tokens": jnp.stack([head.key, head.query]),
        "decay": decays(head.log_decay, head.starts),
        "added": head.added,
        "of_mean": of.mean,
        "of_variance": of.variance,
        "of_evidence": of.log_evidence,
        "of_last_mean": of.last_mean,
        "of_last_covariance": of_last_covariance,
        "of_last_drift": jnp.diagonal(of_last_covariance),
        "of_last_decay": jnp.sum(last_mean * of.last_mean, axis=0)
        + 2 * jnp.sum(last_covariance * of_last_covariance, axis=0),
    }
    found = over_rows(partial(_reverse_rows, values, interpret), of=0)(given["whitened"], given)
    of_key, of_query = found["tokens"]
    of_added, of_log_decay = found["rates"]
    return (
        Head(
            of_key,
            found["value"],
            of_query,
            found["noise"],
            jnp.where(head.starts[:, None], 0, of_log_decay),
            None,  # type: ignore[arg-type]
            of_added,
            found["first_covariance"],
            found["first_mean"],
        ),
    )


def _reverse_rows(
    values: int, interpret: bool, number: int, whitened: Array, given: dict[str, Array]
) -> dict[str, Array]:
    tokens, rates = given["tokens"], (given["decay"], given["added"])
    factored, faded, moved, ends = factors(tokens, rates[0], whitened, interpret=interpret)
    told = {name: given[name] for name in ("of_variance", "of_evidence", "inverse_deviation")}
    zero = dict.fromkeys(
        ("total", "document", "drift", "end"), jnp.zeros_like(given["of_variance"])
    )
    alpha = ends[:, :, 0].reshape(number, -1)
    asked = given["of_mean"], Numbers(alpha=alpha, **told, **zero).by_chunk()
    found = local_of_factors(factored, moved, *asked, values=values, interpret=interpret)
    states = (
        given[name] for name in ("means", "covariances", "of_last_mean", "of_last_covariance")
    )
    got = recur(faded, *asked, found, *states, interpret=interpret)

    def at_ends(starts: Array, last: Array) -> Array:
        return jnp.concatenate([starts[:, 1:], last[:, None]], axis=1)

    means = given["means"].astype(jnp.float32).sum(axis=2)
    scale = jnp.sum(means * got["means"], axis=-2) + got["scale"]
    of_last = [
        at_ends(got["trace"], given["of_last_drift"]),
        at_ends(scale, given["of_last_decay"]),
    ]
    of_tokens, of_rates = of_drift(
        tokens,
        *rates,
        given["of_variance"],
        got["weights"],
        got["tokens"],
        got["ends"],
        jnp.stack(of_last, axis=2),
        interpret=interpret,
    )
    return {
        "tokens": of_tokens,
        "rates": of_rates,
        "first_mean": got["means"][:, 0],
        **{name: got[name] for name in ("value", "noise", "first_covariance")},
    }


_filter_head.defvjp(_forward, _backward)
