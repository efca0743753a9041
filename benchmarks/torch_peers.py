"""Peers that run on PyTorch, timed in a process of their own: one line of JSON for each.

    python -m benchmarks.torch_peers 8,4096,16,64 1,32768,16,64

`benchmarks.kernels` starts it where flash-linear-attention (`fla-core`) is installed, on the same
GPU and with inputs of the same distributions. Calls are replayed as a CUDA graph where the
operation can be captured, so that launches from Python are not counted.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
    chunk_gated_delta_rule,
)
from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]
from fla.ops.mesa_net import chunk_mesa_net  # pyright: ignore[reportMissingImports]

from .kernels import Config, Shape, Timing


def inputs(shape: Shape) -> dict[str, Any]:
    """Unit keys and queries, decays within 2 % of 1, noise from 0.05 to 0.55: as in `kernels`."""
    numbers = (shape.batch, shape.time, shape.heads)
    kept = {"device": "cuda", "dtype": torch.bfloat16}
    key, query, value = (torch.randn(*numbers, shape.width, **kept) for _ in range(3))
    noise = 0.05 + 0.5 * torch.rand(*numbers, device="cuda")
    made = {
        "q": F.normalize(query, dim=-1),
        "k": F.normalize(key, dim=-1),
        "v": value,
        "g": -0.02 * torch.rand(*numbers, device="cuda"),
        "beta": 1 / (1 + noise),
    }
    return {name: array.detach().requires_grad_() for name, array in made.items()}


def contenders(shape: Shape) -> dict[str, Callable[..., Any]]:
    """What is timed on a shape."""
    lamb = torch.full((shape.heads, shape.width), 0.25, device="cuda")

    def by_key(q, k, v, g, beta):
        return chunk_kda(q, k, v, g[..., None].expand_as(q).contiguous(), beta, scale=1.0)[0]

    return {
        "gated delta rule, FLA": lambda **given: chunk_gated_delta_rule(**given, scale=1.0)[0],
        "KDA, FLA": by_key,
        "MesaNet (conjugate gradients), FLA": lambda **given: chunk_mesa_net(**given, lamb=lamb)[0],
    }


def milliseconds(function: Callable[[], Any], config: Config) -> float:
    """Median over batches of a call's time, of a CUDA graph where it can be captured."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        call = graph.replay
    except RuntimeError:
        call = function
    times = []
    for _ in range(config.batches):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(config.calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / config.calls)
    return sorted(times)[len(times) // 2]


def timed(shape: Shape, label: str, function: Callable[..., Any], config: Config) -> Timing:
    """Time one contender; memory is what the gradient takes beside what goes in and comes out."""
    given = inputs(shape)

    def forward() -> Any:
        with torch.no_grad():
            return function(**given)

    def gradient() -> Any:
        return torch.autograd.grad(function(**given).float().square().sum(), list(given.values()))

    forward_ms = milliseconds(forward, config)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = gradient()
    memory = torch.cuda.max_memory_allocated() - before
    memory -= sum(array.nbytes for array in kept)
    del kept
    return Timing(shape, label, forward_ms, milliseconds(gradient, config), memory / 1e6)


def main(arguments: list[str]) -> None:
    for words in arguments:
        shape = Shape(*map(int, words.split(",")))
        for label, function in contenders(shape).items():
            try:
                found = asdict(timed(shape, label, function, Config()))
            except Exception as reason:
                # A peer that refuses a shape or this version of Triton does not end the others.
                found = {"shape": asdict(shape), "contender": label, "error": str(reason)[:300]}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
