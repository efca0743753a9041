"""Where in the user's own code something happened, as "path:line (function)"."""

import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable

from jax.extend.core import Jaxpr, JaxprEqn

LIBRARIES = (
    "jax", "jaxlib", "numpyro", "equinox", "jaxtyping", "beartype", "numpy", "opt_einsum",
)  # fmt: skip
MACHINERY = ("design_model.py", "example_inputs.py", "whole_model.py")


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


def of_equation(eqn: JaxprEqn) -> str:
    """Name the user's line that an equation of a program comes from."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    return of_frames((f.file_name, f.line_num, f.function_name) for f in frames)


def of_library(callee: Jaxpr) -> bool:
    """Whether a program called by another is not known to be a function of the user's."""
    source = (callee.debug_info.func_src_info or "").rpartition(" at ")[2]
    return not source or in_library(source)


def raised_by_library(error: BaseException) -> bool:
    """Whether an error was raised in a library's own code, as by shapes that do not match."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and in_library(frames[-1][0].f_code.co_filename)


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
    machinery = [os.path.join(own, "design_models", name) for name in MACHINERY]
    # beartype's wrappers call themselves `<@beartype(...)>`, generated methods `<string>`.
    folders = [os.path.dirname(file) + os.sep for file in [*files, __file__]]
    return ("<@", "<frozen", "<string>", *machinery, *folders)
