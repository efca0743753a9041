"""Load what a user names: a catalogue entry, or an object in a Python file of theirs."""

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from design_models import DesignModel, ModelError, Recurrence, from_scan, recurrence
from design_models.policy import Exact, Policy
from inference import locations

_FORMS = {
    "transition": ("memory", "u"),
    "observe": ("memory", "u"),
    "readout": ("memory", "u"),
    "inputs": ("rng", "steps"),
    "prior": (),
}
"""What each function of a design model takes."""


@dataclass(frozen=True)
class Subject:
    """What is to be verified: its name, its model, and what is done to the covariance."""

    name: str
    model: DesignModel
    policy: Policy


def load_subject(request: str) -> Subject:
    """Load NAME (of the catalogue) or FILE.py:OBJECT.

    OBJECT is a DesignModel, a catalogue entry of the user's, or a whole NumPyro model: a function
    that loops with `numpyro.contrib.control_flow.scan`.

    Raises:
        ModelError: nothing usable is there; the message says what was found and how to mend it.
    """
    if ".py" not in request:
        if ":" in request or "/" in request:
            raise ModelError(
                f"{request} names no Python file; write FILE.py:OBJECT, or a name of the catalogue."
            )
        entry = recurrence(request)
        return Subject(entry.name, entry.model(), entry.policy)
    found = load_object(request)
    if isinstance(found, Recurrence):
        return Subject(found.name, found.model(), found.policy)
    if isinstance(found, DesignModel):
        for name, taken in _FORMS.items():
            if getattr(found, name) is not None:
                _check_takes(f"`{name}` of {request}", getattr(found, name), taken)
        return Subject(request, found, Exact())
    if isinstance(found, Callable) and not isinstance(found, type):
        return Subject(request, _whole_model(request, found), Exact())
    raise ModelError(
        f"{request} is of type {type(found).__name__}; it must be a DesignModel, "
        "a catalogue entry, or a function that is a whole NumPyro model."
    )


def _whole_model(request: str, function: Callable[..., Any]) -> DesignModel:
    _check_has_inputs(request, function)
    try:
        return from_scan(function)
    except ModelError as error:
        raise ModelError(f"{request}, taken for a whole NumPyro model: {error}") from error
    except Exception as error:
        raise ModelError(f"{request}, taken for a whole NumPyro model, {raised(error)}") from error


def _check_has_inputs(request: str, function: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    if not parameters:
        raise ModelError(
            f"{request}, taken for a whole NumPyro model, takes nothing; it must take the inputs "
            "of its scan, as one dict or by name."
        )


def raised(error: BaseException) -> str:
    """Say in one line what was raised, and where in the user's code."""
    place = locations.of_error(error)
    where = f" ({place})" if place else ""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}){where}; return instead."
    reason = " ".join(str(error).split())
    return f"raised {type(error).__name__}{f': {reason}' if reason else ''}{where}."


def _check_takes(what: str, function: Callable[..., Any], names: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin, which tells nothing
        return
    try:
        signature.bind(*names)
    except TypeError:
        place = locations.of_definition(function)
        raise ModelError(
            f"{what} takes {signature}; it must take ({', '.join(names)})"
            f"{f' ({place})' if place else ''}."
        ) from None


def load_update(request: str) -> Callable[..., Any]:
    """Load FILE.py:FUNCTION, an update(mean, covariance, u).

    Raises:
        ModelError: no function that takes these is there.
    """
    found = load_object(request)
    if not callable(found):
        raise ModelError(f"{request} is of type {type(found).__name__}; it must be a function.")
    _check_takes(request, found, ("mean", "covariance", "u"))
    return found


def load_object(request: str) -> Any:
    """Load FILE.py:OBJECT.

    Raises:
        ModelError: no such file, it does not run, or holds no such name.
    """
    file, _, name = request.rpartition(":") if not request.endswith(".py") else (request, "", "")
    path = Path(file)
    if not path.is_file():
        found = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise ModelError(f"{found}; check the path, or start a file with `mbd new`.")
    module = _run_file(path)
    models = [key for key, value in vars(module).items() if isinstance(value, DesignModel)]
    if not name:
        held = f"it holds {', '.join(models)}" if models else "it holds no DesignModel"
        example = models[0] if models else "model"
        raise ModelError(f"{path} needs a name, as in {path}:{example}; {held}.")
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(name, public, n=1) or models
        hint = f"did you mean {close[0]}?" if close else "define it there."
        raise ModelError(f"{path} holds no `{name}`; {hint}")
    return getattr(module, name)


def _run_file(path: Path) -> ModuleType:
    path = path.resolve()
    content = path.read_bytes()
    mark = hashlib.sha256(bytes(path) + b"\0" + content).hexdigest()[:16]
    name = f"user_file_{mark}"
    if name in sys.modules:  # a model and its update in one file: it runs once
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be read as a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:  # it stays: functions may import siblings when they run
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise _broken(
            name, f"{error.filename or path}{line} is not valid Python: {error.msg}; correct it."
        ) from error
    except ModelError as error:
        raise _broken(name, f"{path}{_line_in(path, error)}: {error}") from error
    except (Exception, SystemExit) as error:
        remedy = ""
        if isinstance(error, ImportError):
            remedy = " Import a file beside it by its plain name, as in `from sibling import x`."
        raise _broken(name, f"{path} {raised(error)}{remedy}") from error
    return module


def _broken(name: str, message: str) -> ModelError:
    del sys.modules[name]
    return ModelError(message)


def _line_in(path: Path, error: BaseException) -> str:
    """The innermost line of a file that an error passed through, as ":12"."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == str(path)
    ]
    return f":{lines[-1]}" if lines else ""
