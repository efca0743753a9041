"""What every test file shares: how programs are compiled, and skips."""

import gc
import os
from pathlib import Path

# Tests compile many small programs and run each once: less optimisation takes a third less time,
# and test processes, later runs too, share what they compiled. JAX reads these when it is imported.
PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / "programs"
for name, value in {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_force_host_platform_device_count=4",
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads only wait for each other where tests take turns
    "PJRT_NPROC": "4",  # simulated kernels block a thread for each of up to three warpgroups
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes millions of small objects, few of them garbage.
gc.set_threshold(100_000, 20, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where JAX has no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        reason = f"needs a CUDA device; JAX runs on {jax.default_backend()} here"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 40_000
"""Every compiled program takes a few memory maps, of which Linux grants a process 65,530; the
compiler crashes without."""


@pytest.fixture(autouse=True)
def _forget_programs_before_maps_run_out(request):
    yield
    session = request.session
    session.tests_run = getattr(session, "tests_run", 0) + 1
    if session.tests_run % 10 == 0 and _MAPS.exists():
        with _MAPS.open("rb") as maps:
            crowded = sum(1 for _ in maps) > _MOST_MAPS
        if crowded:
            jax.clear_caches()
