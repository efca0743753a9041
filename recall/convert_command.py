"""`mbd convert`: its options, and what it does."""

import argparse
from pathlib import Path
from typing import Any

from .terminal import Status


def add_convert_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd convert`."""
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="config.json, safetensors, tokenizer.json"
    )
    command.add_argument(
        "--check",
        type=Path,
        metavar="FILE.safetensors",
        help="compare with the `logits` that `input_ids` gave elsewhere; exit 1 above 1e-3",
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the model back, in the same format"
    )


def run_convert(request: argparse.Namespace) -> tuple[int, Any]:
    """Read a checkpoint; compare its logits and write it back where asked."""
    from dataclasses import asdict

    import jax

    from layers import parameter_count

    from .checkpoints.comparison import LARGEST_ERROR, compare
    from .checkpoints.folder import read_checkpoint, write_checkpoint

    with jax.enable_x64(False), Status("converting") as status:
        status.stage(f"reading {request.folder}")
        checkpoint = read_checkpoint(request.folder)
        own, count = checkpoint.configuration, parameter_count(checkpoint.model)
        found: dict[str, Any] = {"configuration": asdict(own), "parameters": count}
        comparison = None
        if request.check is not None:
            status.stage("comparing logits")
            comparison = compare(checkpoint.model, request.check)
            found["comparison"] = asdict(comparison) | {"agrees": comparison.agrees}
        if request.out is not None:
            status.stage(f"writing {request.out}")
            write_checkpoint(request.out, checkpoint)
            found["out"] = str(request.out)
    print(
        f"{request.folder}: {own.kind}, {own.depth} blocks, d_model {own.d_model}, "
        f"{own.heads} heads of {own.value_width} x {own.key_width}, vocabulary {own.vocabulary}, "
        f"{count:,} parameters"
    )
    if comparison is not None:
        verdict = "agrees" if comparison.agrees else f"departs, by more than {LARGEST_ERROR:g}"
        print(
            f"{request.check}: relative error {comparison.error:.2g} at the worst of "
            f"{comparison.tokens} tokens, {comparison.overall:.2g} over all: {verdict}"
        )
    if request.out is not None:
        print(f"wrote {request.out}")
    return int(comparison is not None and not comparison.agrees), found
