"""The record of one comparison."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One statistic against its threshold; it holds when `statistic` <= `threshold`.

    Args:
        oracle: "joint conditioning", "NUTS", "simulation" or "policy".
        quantity: what was compared.
        statistic: its value; `unit` says in what.
        threshold: the largest value that is accepted.
        unit: "relative error", "standard errors" or "p-value below" (of -log10).
    """

    oracle: str
    quantity: str
    statistic: float
    threshold: float
    unit: str

    @property
    def holds(self) -> bool:
        return bool(self.statistic <= self.threshold)
