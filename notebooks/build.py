"""Build the notebooks from their sources, run them, and render them.

    python -m notebooks.build [NAME ...]

writes NAME.ipynb beside its source, run from top to bottom, and rendered/NAME.md with its figures,
which is what one reads without running anything. Stops at the first cell that fails, as an
assertion of a claim that does not hold does.
"""

import base64
import io
import os
import sys
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient
from nbformat import write
from PIL import Image

FOLDER = Path(__file__).parent
NAMES = ("calibrated", "abstain", "forgetting", "your_recurrence")
_COLOURS = 64


def build(name: str) -> None:
    """Run one notebook and write what comes of it."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    NotebookClient(
        notebook,
        resources={"metadata": {"path": str(FOLDER)}},
        extra_arguments=["--log-level=ERROR"],
        timeout=600,
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which differ from run to run
    write(notebook, FOLDER / f"{name}.ipynb")
    text, figures = rendered(notebook, name)
    into = FOLDER / "rendered"
    into.mkdir(exist_ok=True)
    for old in into.glob(f"{name}_*.png"):
        old.unlink()
    (into / f"{name}.md").write_text(text, encoding="utf-8")
    for file, picture in figures.items():
        (into / file).write_bytes(picture)


def rendered(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook that was run as Markdown, and its figures by file name."""
    parts = [f"*[{name}.py](../{name}.py), as `make notebooks` ran it.*"]
    figures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace("](../", "](../../"))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for kind, outputs in groupby(cell.outputs, key=lambda output: output.output_type):
            if kind == "stream":  # a kernel sends what is printed in pieces, as it likes
                parts.append(f"```text\n{_printed(name, outputs).rstrip()}\n```")
                continue
            for output in outputs:
                if "image/png" in output.get("data", {}):
                    file = f"{name}_{len(figures) + 1}.png"
                    figures[file] = smaller(base64.b64decode(output.data["image/png"]))
                    parts.append(f"![figure {len(figures)}]({file})")
    return "\n\n".join(parts) + "\n", figures


def _printed(name: str, outputs: Iterable[Any]) -> str:
    pieces = list(outputs)
    for piece in pieces:
        if piece.name == "stderr":
            raise SystemExit(f"{name}: a cell wrote to stderr: {piece.text}")
    return "".join(piece.text for piece in pieces)


def smaller(picture: bytes) -> bytes:
    """A PNG of as few colours as plots have."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(_COLOURS)
    shrunk = io.BytesIO()
    image.save(shrunk, "PNG", optimize=True)
    return shrunk.getvalue()


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"no notebook is called {unknown[0]}; there are {', '.join(NAMES)}.")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm would like widgets
    for name in names or NAMES:
        began = time.perf_counter()
        build(name)
        print(f"notebooks/{name}.ipynb and rendered/{name}.md, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
