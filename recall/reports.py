"""What a person reads in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from design_models import CATALOGUE
from inference.update_check import UpdateVerdict

from .untrained import NOISE_RATIO, RecallScore
from .verification import ORACLES, Outcome, worst_check


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Print one verification in full."""
    record = outcome.record
    if outcome.refused is not None:
        refused = outcome.refused
        site = f", site '{refused['site']}'" if refused["site"] else ""
        where = f"\n  at {refused['location']}" if refused["location"] else ""
        console.print(
            Text.assemble(
                (f"{outcome.name}: refused", "bold red"),
                f"\n  `{refused['function']}`{site}: {refused['reason']}{where}",
            ),
            soft_wrap=True,
        )
        return
    structure, policy = record["structure"], record["policy"]["name"]
    sites = "\n".join(f"  {site}" for site in record["sites"])
    console.print(Text(f"{outcome.name}", style="bold"))
    console.print(Text(f"Linear-Gaussian: proved, for every value of its inputs.\n{sites}"))
    console.print(Text(f"Structure: {structure['words']}"))
    console.print(Panel(Text("\n".join(record["update"])), title="derived update", expand=False))
    console.print(checks_table(record["checks"]))
    if policy != "exact":
        console.print(
            Text(
                f"Policy: {policy} of the covariance. Divergence from the exact posterior: "
                f"{record['reduction_cost_nats_per_step']:.3g} nats per step."
            )
        )
    console.print(Text(f"In the catalogue: {record['kinship']['words']}."))
    console.print(Text(f"Compiled paths: {', '.join(record['paths'])} ({record['why_paths']})."))
    if "backend" in record:
        console.print(Text(f"Compiled layers run as: {record['backend']}"))
    verdict = "verified" if outcome.holds else "NOT verified"
    style = "bold green" if outcome.holds else "bold red"
    console.print(Text(f"{verdict} in {record['seconds']:.0f} s, seed {record['seed']}", style))


def checks_table(checks: Sequence[dict[str, Any]]) -> Table:
    """Every statistic, threshold and verdict."""
    table = Table(title="oracles", title_justify="left")
    for heading in ("oracle", "quantity", "statistic", "threshold", "in", "verdict"):
        table.add_column(
            heading, justify="right" if heading in ("statistic", "threshold") else "left"
        )
    for check in checks:
        verdict = Text("holds", "green") if check["holds"] else Text("fails", "bold red")
        table.add_row(
            check["oracle"],
            check["quantity"],
            f"{check['statistic']:.2g}",
            f"{check['threshold']:.2g}",
            check["unit"],
            verdict,
        )
    return table


def summary_table(outcomes: Sequence[Outcome], stages: dict[str, str]) -> Table:
    """One row per verified model; rows without an outcome show their stage."""
    table = Table(title="verification", title_justify="left")
    table.add_column("recurrence", no_wrap=True)
    table.add_column("policy")
    table.add_column("structure")
    headings = ("joint: error", "simulation: z", "NUTS: z", "policy: error")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("cost, nats", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("verdict", no_wrap=True)
    done = {outcome.name: outcome for outcome in outcomes}
    for name in stages | done:
        if name not in done:
            policy = type(CATALOGUE[name].policy).__name__.lower() if name in CATALOGUE else ""
            table.add_row(name, policy, "", "", "", "", "", "", "", Text(stages[name], "dim"))
        else:
            table.add_row(name, *_summary(done[name]))
    return table


def _summary(outcome: Outcome) -> list[str | Text]:
    record = outcome.record
    if outcome.refused is not None:
        return ["", "", "", "", "", "", "", "", Text("refused", "bold red")]
    cells: list[str | Text] = [record["policy"]["name"], record["structure"]["kind"]]
    for oracle in ORACLES:
        worst = worst_check(record, oracle)
        if worst is None:
            cells.append("–")
        elif worst["unit"] == "relative error":
            cells.append(f"{worst['statistic']:.0e}")
        else:
            scores = [
                check["statistic"]
                for check in record["checks"]
                if check["oracle"] == oracle and check["unit"] == "standard errors"
            ]
            cells.append(f"{max(scores):.1f}" if scores else f"{worst['statistic']:.1f}")
    cost = record["reduction_cost_nats_per_step"]
    cells.append("–" if cost is None else f"{cost:.2g}")
    cells.append(f"{record['seconds']:.0f}")
    cells.append(Text("verified", "green") if outcome.holds else Text("FAILS", "bold red"))
    return cells


def print_update(console: Console, name: str, verdict: UpdateVerdict, compared: str) -> None:
    """Print whether a hand-derived update is the exact filter, and with what it was compared."""
    style = "bold green" if verdict.exact else "bold red"
    console.print(Text(f"{name}: {verdict.words}", style), soft_wrap=True)
    console.print(Text(f"Compared with {compared}."), soft_wrap=True)


def catalogue_table() -> Table:
    """The catalogue."""
    table = Table(title="catalogue", title_justify="left")
    for heading in ("name", "design model", "policy", "compiled paths", "paper", "note"):
        table.add_column(heading, no_wrap=heading in ("name", "policy"))
    for entry in CATALOGUE.values():
        table.add_row(
            entry.name,
            entry.assumption,
            type(entry.policy).__name__.lower(),
            ", ".join(entry.paths),
            entry.paper,
            entry.note,
        )
    return table


def bench_table(timings: Sequence[Any]) -> Table:  # bench.Timing, whose module is slow to load
    """Milliseconds, megabytes, and ratios to each comparison's first line."""
    table = Table(title="speed and memory, ratios to the first of each", title_justify="left")
    for heading in ("comparison", "shape B,T,H,K=V", "contender"):
        table.add_column(heading)
    for heading in ("forward ms", "ratio", "with gradient ms", "ratio", "memory MB", "ratio"):
        table.add_column(heading, justify="right")

    def cells(number: float | None, ratio: float | None) -> tuple[str, str]:
        return ("–", "–") if number is None or ratio is None else (f"{number:.1f}", f"{ratio:.2f}")

    for timing in timings:
        shape = timing.shape
        table.add_row(
            timing.comparison,
            f"{shape.batch},{shape.time},{shape.heads},{shape.width}",
            timing.contender,
            *cells(timing.forward_ms, timing.forward_ratio),
            *cells(timing.gradient_ms, timing.gradient_ratio),
            *cells(timing.memory_mb, timing.memory_ratio),
        )
    return table


def recall_table(scores: Sequence[RecallScore]) -> Group:
    """Accuracy, squared error and predicted variance, filter by filter, against width."""
    table = Table(title="recall without training", title_justify="left")
    table.add_column("filter")
    for heading in ("width", "accuracy", "squared error", "predicted variance"):
        table.add_column(heading, justify="right")
    previous = ""
    for score in scores:
        table.add_row(
            score.filter if score.filter != previous else "",
            str(score.width),
            f"{score.accuracy:.3f}",
            f"{score.squared_error:.4f}",
            f"{score.predicted_variance:.4f}",
        )
        previous = score.filter
    note = Text(
        "Squared error: of the read-out, from the value last written with the key, which has "
        "length 1. Predicted variance: of the read-out by the filter's own belief, without "
        "observation noise, summed over its entries. The two are not the same quantity, and the "
        "prediction holds under the filter's own assumptions alone: noise of "
        f"{NOISE_RATIO:g} of the prior variance, where the values written here have none, and, of "
        "exact and reset, values that are linear in keys, which random ones are not once keys are "
        "as many as the width, or written anew.",
        style="dim",
    )
    return Group(table, note)
