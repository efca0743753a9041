"""What every test file shares: how programs are compiled, and skips."""

import os
import sys

import jax
import pytest

# Tests compile many small programs and run each once: less optimisation takes a quarter less time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Run by name until they fit the suite's time: tests/test_layers.py and the others named here.
collect_ignore = (
    []
    if any(argument.endswith(".py") for argument in sys.argv[1:])
    else ["test_compiled.py", "test_layers.py", "test_new_recurrence.py"]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where JAX has no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        reason = f"needs a CUDA device; JAX runs on {jax.default_backend()} here"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
