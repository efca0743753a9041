"""`mbd ruler`: its options, and what it does."""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from .option_types import whole
from .terminal import Status, console

TASK_NAMES = (
    "niah_single_1",
    "niah_single_2_prose",
    "niah_single_3_prose",
    "niah_multikey_1_prose",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue_prose",
    "niah_multiquery_prose",
    "vt",
    "cwe",
    "fwe",
)
"""As in `recall.ruler.catalogue`, which takes SciPy to import."""


def add_ruler_options(command: argparse.ArgumentParser) -> None:
    """Options of `mbd ruler`."""
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="config.json, safetensors, tokenizer.json"
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of finished cells, a record and a plot; the same command again goes on there",
    )
    command.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,...",
        help=f"{', '.join(TASK_NAMES)}; qa_1 or qa_2 with --qa (default: all). Those in _prose are "
        "RULER's on other prose; the other six are RULER's to the letter",
    )
    command.add_argument(
        "--lengths",
        type=_lengths,
        default=(1024, 2048, 4096, 8192),
        metavar="N,...",
        help="tokens of a text, answer included, in the model's own (default 1024,2048,4096,8192)",
    )
    command.add_argument(
        "--samples", type=whole(1), default=500, metavar="N", help="of each cell (default 500)"
    )
    command.add_argument(
        "--seed", type=whole(0), default=42, help="of all texts (default 42, RULER's own)"
    )
    command.add_argument(
        "--prose",
        type=Path,
        metavar="FILE",
        help="text to hide things in, plain, .gz or .xz (default: 32,000 words of Thoreau and "
        "Austen; longer texts begin again)",
    )
    command.add_argument(
        "--qa",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="questions in SQuAD's format (qa_1) or HotpotQA's (qa_2)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations (default float32)",
    )
    command.add_argument(
        "--rows", type=whole(1), metavar="N", help="texts at once (default: as memory allows)"
    )


def run_ruler(request: argparse.Namespace) -> tuple[int, Any]:
    """Measure every cell that is not finished, and tell all."""
    import jax

    with jax.enable_x64(False), Status("ruler") as status:
        return _run(request, status)


def _run(request: argparse.Namespace, status: Status) -> tuple[int, Any]:
    from .checkpoints.folder import read_checkpoint
    from .records import record, write_json
    from .ruler.cells import CellFolder, Texts, measure
    from .ruler.generation import Generator
    from .ruler.inputs import chosen_tasks, digest, first_samples, read_prose
    from .ruler.report import cells_table, plot_cells
    from .ruler.tokens import vocabulary_of
    from .ruler.words import edition

    start = time.perf_counter()
    tasks = chosen_tasks(request.tasks, request.qa)
    prose = read_prose(request.prose)
    status.stage(f"reading {request.folder}")
    checkpoint = read_checkpoint(request.folder)
    vocabulary = vocabulary_of(checkpoint.beside, checkpoint.configuration.vocabulary)
    texts = Texts(request.samples, request.seed, prose.split())
    setting = {
        "checkpoint": digest(sorted(request.folder.iterdir())),
        "samples": request.samples,
        "seed": request.seed,
        "dtype": request.dtype,
        "words": edition(),
    }
    settings = {
        task.name: setting
        | ({"prose": digest([request.prose])} if task.in_prose and request.prose else {})
        | ({"qa": digest(request.qa)} if task.name.startswith("qa_") else {})
        for task in tasks
    }
    folder = CellFolder(request.out)
    wanted = [(task, length) for length in request.lengths for task in tasks]
    cells = {
        (task.name, length): folder.read(task.name, length, settings[task.name])
        for task, length in wanted
    }
    missing = [(task, length) for task, length in wanted if not cells[task.name, length]]
    status.stage("drawing texts")
    first_samples(missing, texts, vocabulary.count)
    speaker = Generator(
        checkpoint.model,
        vocabulary.end,
        max(task.drawn.answer for task in tasks),
        rows=request.rows,
        dtype=request.dtype,
    )
    for number, (task, length) in enumerate(missing, 1):

        def stage(words: str, number: int = number) -> None:
            status.stage(f"cell {number} of {len(missing)}, {words}")

        cell = measure(task, length, texts, vocabulary, speaker, stage)
        folder.write(cell, settings[task.name])
        cells[task.name, length] = cell
    measured = [cell for cell in cells.values() if cell is not None]
    title = f"RULER: {request.folder}"
    console().print(cells_table(measured, title))
    found = record(
        {
            **setting,
            "folder": str(request.folder),
            "tasks": [task.name for task in tasks],
            "lengths": list(request.lengths),
            "prose": str(request.prose) if request.prose else "shipped",
            "model": checkpoint.configuration.kind,
        },
        [cell.as_record() for cell in measured],
        command=shlex.join(_words(request)),
        seed=request.seed,
        seconds=time.perf_counter() - start,
    )
    write_json(request.out / "record.json", found)
    plot_cells(request.out / "ruler.png", measured, title)
    print(f"{len(missing)} of {len(wanted)} cells measured now; record and plot: {request.out}")
    return 0, found


def _words(request: argparse.Namespace) -> list[str]:
    words = ["mbd", "ruler", str(request.folder), "--out", str(request.out)]
    if request.tasks:
        words += ["--tasks", ",".join(request.tasks)]
    words += ["--lengths", ",".join(map(str, request.lengths))]
    words += ["--samples", str(request.samples), "--seed", str(request.seed)]
    if request.prose:
        words += ["--prose", str(request.prose)]
    if request.qa:
        words += ["--qa", *map(str, request.qa)]
    words += ["--dtype", request.dtype]
    return words + (["--rows", str(request.rows)] if request.rows else [])


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no lengths; give some, as in 1024,2048")
    return tuple(sorted({int(part) for part in parts}))
