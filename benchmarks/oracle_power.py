"""What the oracles catch, and how often they reject an exact filter.

Faults are planted in the exact filter of every model in the catalogue and in every reduction.

    python -m benchmarks.oracle_power
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax

from inference.derivation import derive
from inference.exact_filter import ExactFilter
from inference.oracles.statistics import FALSE_ALARM
from inference.verify import set_scene
from recall.records import record, write_json
from tests.planted_faults import FAULTS, Bench, Case, Claims, catalogue_cases, failed, faults_of

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Config:
    """Seeds of a study; every seed draws its own inputs, observed values, simulation and chains."""

    power_seeds: tuple[int, ...] = (0, 10, 20)
    alarm_cases: tuple[str, ...] = (
        "bayesian_layer",
        "linear_attention",
        "kalman_linear_attention",
    )
    alarm_seeds: tuple[int, ...] = tuple(range(1000, 3000, 10))
    nuts_alarm_seeds: tuple[int, ...] = tuple(range(1000, 2000, 10))


@dataclass
class Result:
    """Detection rates by case, fault and oracle; rejections of exact filters by case and oracle."""

    power: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    honest: dict[str, dict[str, float]] = field(default_factory=dict)
    alarms: dict[str, dict[str, dict]] = field(default_factory=dict)


def run(config: Config, progress: Callable[[str], None]) -> Result:
    """Run the study."""
    result = Result()
    with jax.enable_x64(True):
        for case in catalogue_cases():
            start = time.perf_counter()
            exact, bench = derive(case.model), Bench(case)
            rates = power(case, exact, bench, config.power_seeds)
            result.honest[case.name] = rates.pop("none")
            result.power[case.name] = rates
            if case.name in config.alarm_cases:
                result.alarms[case.name] = alarms(case, exact, bench, config, progress)
            progress(f"{case.name}: {time.perf_counter() - start:.0f} s")
    return result


def power(
    case: Case, exact: ExactFilter, bench: Bench, seeds: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """Rejection rate by fault and oracle; fault "none" is the filter as derived."""
    claims = Claims(case, exact, faults_of(case, exact))
    oracles = (
        {"joint": bench.joint, "NUTS": bench.nuts, "simulation": bench.simulation}
        if case.exact
        else {"textbook": bench.textbook}
    )
    rates = {name: dict.fromkeys(oracles, 0.0) for name in claims.names}
    for seed in seeds:
        scene = set_scene(exact, seed)
        for oracle, judge in oracles.items():
            for name, checks in judge(claims, scene).items():
                rates[name][oracle] += failed(checks) / len(seeds)
    return rates


def alarms(
    case: Case, exact: ExactFilter, bench: Bench, config: Config, progress: Callable[[str], None]
) -> dict[str, dict]:
    """How often each oracle rejects the exact filter, and for which quantity."""
    honest = Claims(case, exact, [])
    counts = {}
    for oracle, judge, seeds in (
        ("joint", bench.joint, config.alarm_seeds),
        ("simulation", bench.simulation, config.alarm_seeds),
        ("NUTS", bench.nuts, config.nuts_alarm_seeds),
    ):
        rejected = {}
        for seed in seeds:
            checks = judge(honest, set_scene(exact, seed))["none"]
            if failed(checks):
                rejected[seed] = [check.quantity for check in checks if not check.holds]
        counts[oracle] = {"runs": len(seeds), "rejections": len(rejected), "which": rejected}
        progress(f"  {oracle}: {len(rejected)} rejections of the exact filter in {len(seeds)} runs")
    return counts


def table(config: Config, result: Result) -> str:
    """The study as Markdown."""
    names = [fault.name for fault in FAULTS]

    def row(case: str) -> str:
        cells = [
            " / ".join(f"{rate:.2g}" for rate in result.power[case][name].values())
            if name in result.power[case]
            else ""
            for name in names
        ]
        return f"| {case} | {' | '.join(cells)} |"

    def rows(oracle: str) -> list[str]:
        return [row(case) for case, rates in result.honest.items() if oracle in rates]

    head = [f"| filter of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines = [
        "# What the oracles catch",
        "",
        f"Fraction of {len(config.power_seeds)} seeds at which a fault, planted in every step of a "
        "derived filter, is rejected; memories are 2×2. Each cell of the first table reads joint "
        "conditioning / NUTS / simulation. Written by `python -m benchmarks.oracle_power`; the "
        "record is `oracle_power.json`.",
        "",
        "## Exact filters",
        "",
        *head,
        *rows("joint"),
        "",
        "## Reductions, against their textbook recurrence",
        "",
        *head,
        *rows("textbook"),
        "",
        "## False alarms",
        "",
        f"Rejections of the exact filter; NUTS and simulation are set to {FALSE_ALARM:g} a run.",
        "",
        "| filter of | joint conditioning | NUTS | simulation |",
        "|---|---|---|---|",
    ]
    for case, counts in result.alarms.items():
        cells = [
            f"{counts[oracle]['rejections']} of {counts[oracle]['runs']}"
            for oracle in ("joint", "NUTS", "simulation")
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study and write its record and its table."""
    config, start = Config(), time.perf_counter()
    result = run(config, lambda line: print(line, flush=True))
    RESULTS.mkdir(exist_ok=True)
    data = record(
        asdict(config),
        asdict(result),
        command="python -m benchmarks.oracle_power",
        seed=sorted({*config.power_seeds, *config.alarm_seeds, *config.nuts_alarm_seeds}),
        seconds=time.perf_counter() - start,
    )
    write_json(RESULTS / "oracle_power.json", data)
    (RESULTS / "oracle_power.md").write_text(table(config, result))


if __name__ == "__main__":
    main()
