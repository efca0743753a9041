"""Checkpoints of published sizes: read, run, and compared with flash-linear-attention's own model.

    python -m benchmarks.large_checkpoints --json results/large_checkpoints_h200.json

Weights are random, in bfloat16, in folders that flash-linear-attention wrote; it must be
installed, and a GPU be there. Errors are relative, by the norm of all logits: of
flash-linear-attention's model in bfloat16, and of ours in bfloat16, to ours in float32. Times are
of a forward pass, and of steps that distil Bayesian Layers into the model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from layers import LanguageModel, parameter_count
from recall.checkpoints.folder import read_checkpoint
from recall.checkpoints.model import logits
from recall.checkpoints.surgery import with_restoration
from recall.language.forward import Packed, head_of, run_rows
from recall.language.objectives import on_teacher
from recall.language.training import Descent, make_step, mesh_of, started
from recall.records import keeper

from .devices import measured
from .kernels import relative

SETTINGS: dict[str, dict[str, Any]] = {
    "Gated DeltaNet, 6 heads, as wide as published": {
        "model_type": "gated_deltanet",
        "hidden_size": 1024,
        "num_hidden_layers": 21,
    },
    "Gated DeltaNet, 360M": {
        "model_type": "gated_deltanet",
        "hidden_size": 1024,
        "num_hidden_layers": 21,
        "num_heads": 4,
        "expand_v": 1,
    },
    "DeltaNet, 340M": {"model_type": "delta_net", "hidden_size": 1024, "num_heads": 8},
}


@dataclass(frozen=True)
class Config:
    """What is run."""

    rows: int = 4
    time: int = 1024
    calls: int = 5
    restored: tuple[int, ...] = (7, 14)


def in_bfloat16(model: LanguageModel, rows: jax.Array) -> jax.Array:
    """Logits of whole rows, computed in bfloat16."""
    nothing = jnp.zeros(rows.shape)
    batch = Packed(rows, rows, jnp.zeros(rows.shape, jnp.int32), nothing, nothing > 0)
    hidden = run_rows(model, batch, "bfloat16").hidden
    head = head_of(model).astype(hidden.dtype)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def compared(settings: dict[str, Any], folder: Path, config: Config) -> dict[str, Any]:
    """What came of one model."""
    words = (str(folder), json.dumps(settings), str(config.rows), str(config.time))
    command = [sys.executable, "-m", "benchmarks.fla_checkpoint", *words]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    held = load_file(folder / "expected.safetensors")
    start = time.perf_counter()
    model = read_checkpoint(folder).model
    read_seconds = time.perf_counter() - start
    rows = jnp.asarray(held["input_ids"], jnp.int32)
    exact, run = logits(model, rows), eqx.filter_jit(in_bfloat16)
    rounded = run(model, rows)
    return {
        "parameters": parameter_count(model),
        "error, flash-linear-attention": relative(held["logits"], exact),
        "error, bfloat16": relative(rounded, exact),
        "ms, flash-linear-attention": json.loads(said.splitlines()[-1])["ms"],
        "ms, bfloat16": measured(lambda: run(model, rows), config.calls)["ms"],
        "seconds to read": read_seconds,
        "distilling": distilled(model, config),
    }


def distilled(model: LanguageModel, config: Config) -> dict[str, float]:
    """Tokens a second of `mbd distill --lean`, and the seconds before its second step."""
    student = started(with_restoration(model, layers=config.restored))
    objective = on_teacher(0, "bfloat16", task=0.5, answers=5.0, lean=True)
    step = make_step(objective, Descent(1e-4, 2e-2, 400, 20), student, model, mesh_of(1))
    shape = config.rows, config.time + 1
    tokens = np.random.default_rng(0).integers(1, model.embedding.shape[0], shape, np.uint16)
    seconds = []
    for number in range(config.calls + 1):
        start = time.perf_counter()
        student, told = step(student, tokens, number)
        jax.block_until_ready(told)
        seconds.append(time.perf_counter() - start)
    each = statistics.median(seconds[1:])
    return {"tokens/s": config.rows * config.time / each, "seconds of the first step": seconds[0]}


def run(config: Config, progress: Callable[[dict[str, Any]], None]) -> None:
    """Every model; `progress` gets all that is known after each."""
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = compared(settings, Path(folder), config)
        progress(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the record goes")
    given = parser.parse_args(arguments)
    config = Config()
    command = f"python -m benchmarks.large_checkpoints --json {given.json}"
    write = keeper(given.json, asdict(config) | {"models": SETTINGS}, command=command, seed=0)

    def keep(metrics: dict[str, Any]) -> None:
        print(json.dumps({name: metrics[name] for name in list(metrics)[-1:]}), flush=True)
        write(metrics)

    run(config, keep)


if __name__ == "__main__":
    main()
