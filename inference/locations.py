"""Where in the user's own code something happened, as "path:line (function)"."""

import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable

LIBRARIES = ("jax", "jaxlib", "numpyro", "equinox", "jaxtyping", "beartype")


def of_frames(frames: Iterable[tuple[str, int, str]]) -> str:
    """Name the first (file, line, function), innermost first, outside the libraries, or ""."""
    for file, line, function in frames:
        if not in_library(file):
            return f"{file}:{line} ({function.rpartition('<locals>.')[2]})"
    return ""


def here() -> str:
    """Name the innermost line of the running stack outside the libraries."""
    stack = traceback.walk_stack(sys._getframe())
    return of_frames((f.f_code.co_filename, line, f.f_code.co_qualname) for f, line in stack)


def of_error(error: BaseException) -> str:
    """Name the innermost line outside the libraries that an error passed through."""
    frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    return of_frames((f.f_code.co_filename, line, f.f_code.co_qualname) for f, line in frames)


def of_definition(function: object) -> str:
    """Name the first line of a function, or "" where that cannot be known."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})" if code else ""


def in_library(file: str) -> bool:
    """Whether a file belongs to the libraries or to the machinery that runs the user's model."""
    return file.startswith(_library_folders())


@functools.cache
def _library_folders() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in LIBRARIES]
    files = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    own = os.path.dirname(os.path.dirname(__file__))
    machinery = os.path.join(own, "design_models", "design_model.py")
    # beartype's wrappers call themselves `<@beartype(...)>`.
    folders = [os.path.dirname(file) + os.sep for file in [*files, __file__]]
    return ("<@", "<frozen", machinery, *folders)
