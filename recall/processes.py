"""Several processes of one run: joined where a cluster started them, or started on this host.

Under SLURM, Open MPI or Kubernetes, `jax.distributed.initialize` finds the others by itself. Where
nothing of the kind is found, the command starts so many processes here, over loopback. By hand, on
any hosts, start the same command in each with these three set:

    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 mbd train ...
"""

import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np

from design_models import ModelError

_ADDRESS, _COUNT, _PLACE = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_HEARTBEAT_SECONDS = 20
"""A process that is silent so long is lost, and the others end."""
_WRONG_REQUEST = 2
_GRACE_SECONDS = 3.0
"""For which the others may say what they saw, when one has ended."""


class LostProcess(RuntimeError):
    """A process of the run ended before the others."""


def joined(count: int) -> bool:
    """Join the processes of a run; False where none are there, and this one should start them.

    Raises:
        ModelError: the environment holds another number of processes.
    """
    if os.environ.get(_PLACE, "").isdigit():
        jax.distributed.initialize(
            os.environ[_ADDRESS],
            int(os.environ[_COUNT]),
            int(os.environ[_PLACE]),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    else:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        except ValueError:  # nothing in the environment says where the others are
            return False
    if jax.process_count() != count:
        raise ModelError(
            f"`--processes` is {count}; this environment started {jax.process_count()}."
        )
    return True


def run_here(words: Sequence[str], count: int) -> int:
    """Run a command in so many processes on this host, and wait for them.

    Args:
        words: of the command.
        count: of processes; each sees one GPU where there are any.

    Returns:
        The exit code of all.

    Raises:
        LostProcess: one ended before the others, which are ended too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    places, silent = range(count), subprocess.DEVNULL
    with tempfile.TemporaryFile("w+") as said:
        processes = [
            subprocess.Popen(
                words,
                env=os.environ
                | {_ADDRESS: address, _COUNT: str(count), _PLACE: str(place)}
                | {"JAX_LOCAL_DEVICE_IDS": str(place)},
                stdout=None if place == 0 else silent,
                stderr=None if place == 0 else said,
            )
            for place in places
        ]
        try:
            failed, codes = _watch(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is None:
            return 0
        place, code = failed
        if codes[0] == code == _WRONG_REQUEST:  # all refuse it, and the first has said why
            return code
        said.seek(0)
        sys.stderr.write(said.read())
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise LostProcess(f"process {place} of {count} ended ({how})")


def _watch(
    processes: list[subprocess.Popen[bytes]],
) -> tuple[tuple[int, int] | None, list[int | None]]:
    """Once all have ended: None. Once one has failed: its place and exit code; and all codes."""
    failed, deadline = None, math.inf
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            ended = [(place, code) for place, code in enumerate(codes) if code]
            failed = min(ended, key=lambda one: one[1])  # a signal before what others made of it
            deadline = time.monotonic() + _GRACE_SECONDS
        if None not in codes or time.monotonic() > deadline:
            return failed, codes
        time.sleep(0.05)


def leave(code: int) -> NoReturn:
    """Exit without waiting for processes that are lost, as JAX would at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all(what: str) -> None:
    """Wait until every process of the run is here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)


def of_first_process(decision: bool) -> bool:
    """What the run's first process decides, in every process."""
    if jax.process_count() == 1:
        return decision
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return bool(broadcast_one_to_all(np.asarray(decision)))
