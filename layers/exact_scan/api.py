"""The exact scan: design model A filtered along one sequence, for one head."""

from typing import Literal

import jax

from ..chunks import chunk_length, join, split
from .chunked import scan_chunks
from .reference import scan_tokens
from .tokens import (
    Prediction,
    Restoration,
    State,
    Steps,
    Tokens,
    check,
    collect,
    expand,
    working_dtype,
)

CHUNK = 64

Backend = Literal["token", "chunked", "parallel"]


def scan_exact(
    tokens: Tokens,
    initial: State,
    *,
    restoration: Restoration | None = None,
    backend: Backend = "chunked",
) -> tuple[Prediction, State]:
    r"""Filter design model A exactly, token by token in meaning whatever the backend.

    Before a token's writes $M \leftarrow M\,\mathrm{diag}(a)$ and
    $P \leftarrow \mathrm{diag}(a) P\,\mathrm{diag}(a) + \mathrm{diag}(q)$, then, with a
    `restoration`, $P \leftarrow λP + (1-λ)σ^2 I$; each observation is absorbed by
    $s = k^\top P k + r,\; g = Pk/s,\; M \leftarrow M + (v - Mk) g^\top,\; P \leftarrow P - sgg^\top$;
    last the query reads $M x$ and $x^\top P x$.

    Backends: "token" is the definition, one token after another. "chunked" does matrix products
    and one factorisation for 64 tokens at once, chunk after chunk; its backward pass stores one
    belief per chunk. "parallel" also runs the chunks at once, at about twice the work, for short
    batches of long sequences. All give the same values and gradients up to rounding: in float32
    relative errors near 1e-4 or less for prior variance over noise up to 1e4.

    Everything is computed in float32, or in float64 if an input is; the predicted means return in
    the values' dtype. Gradients reach every input and are symmetric for the covariance.

    Args:
        tokens: one sequence, of any length, 0 included.
        initial: belief before the first token and at the start of every packed document.
        restoration: λ and σ²; None is λ = 1.
        backend: how to compute it.

    Raises:
        ValueError: shapes disagree, or there is no such `backend`.
    """
    check(tokens, initial)
    if backend not in ("token", "chunked", "parallel"):
        raise ValueError(f'`backend` is {backend!r}; it must be "token", "chunked" or "parallel".')
    dtype = working_dtype(tokens, initial)
    covariance = initial.covariance.astype(dtype)
    initial = State(initial.mean.astype(dtype), (covariance + covariance.T) / 2)
    steps = expand(tokens, restoration, dtype)
    count = steps.key.shape[0]
    # The covariance needs full float32 products; accelerators round them by default.
    with jax.default_matmul_precision("highest"):
        if backend == "token" or count == 0:
            read, final = scan_tokens(steps, initial)
        else:
            chunks = _cut(steps, chunk_length(count, CHUNK))
            order = "sequential" if backend == "chunked" else "associative"
            reads, final = scan_chunks(order, chunks, initial)
            read = jax.tree.map(lambda array: join(array, count), reads)
            read = read.mean, read.variance, read.log_evidence
    return collect(*read, tokens), final


def _cut(steps: Steps, length: int) -> Steps:
    """Cut into chunks; what completes the last one changes nothing."""
    fill = Steps(query=0, key=0, value=0, noise=1, decay=1, drift=0, kept=1, reset=False)
    return Steps(
        **{
            name: None if array is None else split(array, length, getattr(fill, name))
            for name, array in vars(steps).items()
        }
    )
