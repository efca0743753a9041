"""What every test file shares: how programs are compiled, and skips."""

import os

import jax
import pytest

# Tests compile many small programs and run each once: less optimisation takes a third less time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where JAX has no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        reason = f"needs a CUDA device; JAX runs on {jax.default_backend()} here"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
