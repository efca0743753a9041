"""Text files as documents."""

import gzip
import lzma
from collections.abc import Sequence
from pathlib import Path

from design_models import ModelError

SEPARATOR = "\x1e"
"""The record separator: between documents of one file."""

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Documents of text files, plain or packed (.xz, .gz), in UTF-8.

    A file is one document, or several with a line of `SEPARATOR` between them.

    Raises:
        ModelError: a file cannot be read, or no text is left.
    """
    found = []
    for path in paths:
        try:
            with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise ModelError(f"`TEXT` is {path}, no text that can be read: {error}.") from error
        found += [part.strip() for part in text.split(SEPARATOR)]
    found = [text for text in found if text]
    if not found:
        names = ", ".join(map(str, paths))
        raise ModelError(f"`TEXT` is {names}, which holds no text; name a file that does.")
    return found
