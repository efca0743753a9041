r"""Chunk after chunk, with a backward pass that keeps only the beliefs between chunks.

Backward: the outputs' cotangents give every chunk's local cotangents of the belief at its start,
all chunks at once; the closed loop (Ψ, Θ, ρ) of `chunk.Closed` passes them on,

$$ \bar M_0 = \bar M Ψ^\top + \text{local},\qquad
   \bar P_0 = ρ Ψ \bar P Ψ^\top + \mathrm{sym}(Θ^\top \bar M Ψ^\top) + \text{local}, $$

products of K×K matrices only; a second pass over the chunks, all at once again, turns the
cotangents at both ends into those of the inputs.
"""

from functools import partial
from typing import Literal

import jax

from ..chunks import map_grouped
from . import parallel
from .chunk import Closed, Reads, advance, closed_loop, prepare
from .tokens import State, Steps

GROUP = 32
"""Chunks whose intermediate values are in memory together."""

Order = Literal["sequential", "associative"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_chunks(order: Order, chunks: Steps, initial: State) -> tuple[Reads, State]:
    """Filter chunks of steps, stacked along the first axis; `order` says how beliefs pass on."""
    return _forward(order, chunks, initial)[0]


def _forward(order, chunks, initial):
    fresh = _fresh(chunks, initial)
    prepared = map_grouped(prepare, chunks, GROUP)
    if order == "sequential":

        def step(state, now):
            following, reads = advance(now, state, fresh)
            return following, (state, reads)

        final, (starts, reads) = jax.lax.scan(step, initial, prepared)
    else:
        starts, final = parallel.beliefs(prepared, initial, fresh, GROUP)

        def read(now):
            return advance(*now, fresh)[1]

        reads = map_grouped(read, (prepared, starts), GROUP)
    return (reads, final), (chunks, initial, starts)


def _backward(order, saved, cotangents):
    chunks, initial, starts = saved
    reads_bar, final_bar = cotangents
    fresh = _fresh(chunks, initial)

    def local(now):
        steps, start, reads_bar = now
        prepared = prepare(steps)
        _, pullback = jax.vjp(lambda start: advance(prepared, start, fresh)[1], start)
        return closed_loop(prepared, start, fresh), pullback(reads_bar)[0]

    closed, sources = map_grouped(local, (chunks, starts, reads_bar), GROUP)
    pass_back = parallel.pass_back if order == "associative" else _pass_back
    ends_bar, initial_bar = pass_back(closed, sources, final_bar)

    def inputs(now):
        steps, start, cotangents = now

        def outputs(steps, fresh):
            end, reads = advance(prepare(steps), start, fresh)
            return reads, end

        return jax.vjp(outputs, steps, fresh)[1](cotangents)

    chunks_bar, fresh_bar = map_grouped(inputs, (chunks, starts, (reads_bar, ends_bar)), GROUP)
    if fresh is not None:
        initial_bar = jax.tree.map(
            lambda carried, new: carried + new.sum(0), initial_bar, fresh_bar
        )
    return chunks_bar, initial_bar


scan_chunks.defvjp(_forward, _backward)


def _fresh(chunks: Steps, initial: State) -> State | None:
    return None if chunks.reset is None else initial


def _pass_back(closed: Closed, sources: State, final_bar: State) -> tuple[State, State]:
    """Return the cotangents of the belief at each chunk's end, and of the initial one."""

    def step(end_bar, now):
        return parallel.belief_cotangent(*now, end_bar), end_bar

    initial_bar, ends_bar = jax.lax.scan(step, final_bar, (closed, sources), reverse=True)
    return ends_bar, initial_bar
