"""Load what a user names: a catalogue entry, or an object in a Python file of theirs."""

import difflib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from design_models import DesignModel, ModelError, Recurrence, from_scan, recurrence
from design_models.policy import Exact, Policy
from inference import locations


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
        return Subject(request, found, Exact())
    if isinstance(found, Callable) and not isinstance(found, type):
        return Subject(request, _whole_model(request, found), Exact())
    raise ModelError(
        f"{request} is a {type(found).__name__}; it must be a DesignModel, a catalogue entry, or a "
        "function that is a whole NumPyro model."
    )


def _whole_model(request: str, function: Callable[..., Any]) -> DesignModel:
    try:
        return from_scan(function)
    except ModelError as error:
        raise ModelError(f"{request}, taken for a whole NumPyro model: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{request}, taken for a whole NumPyro model, raised {type(error).__name__}: {reason} "
            f"({locations.of_error(error)})."
        ) from error


def load_function(request: str) -> Callable[..., Any]:
    """Load FILE.py:FUNCTION.

    Raises:
        ModelError: nothing callable is there.
    """
    found = load_object(request)
    if not callable(found):
        raise ModelError(f"{request} is a {type(found).__name__}; it must be a function.")
    return found


def load_object(request: str) -> Any:
    """Load FILE.py:OBJECT.

    Raises:
        ModelError: no such file, it does not run, or holds no such name.
    """
    file, _, name = request.rpartition(":") if not request.endswith(".py") else (request, "", "")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {path}; check the path, or start one with `mbd new`.")
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
    spec = importlib.util.spec_from_file_location(f"user_file_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be read as a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ModelError(f"{path}:{error.lineno} is not valid Python: {error.msg}.") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path} raised {type(error).__name__}: {reason} ({locations.of_error(error)})."
        ) from error
    finally:
        sys.path.pop(0)
    return module
