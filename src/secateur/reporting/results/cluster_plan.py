"""What a dry run of `prune` returns for a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.advisor.cluster import ClusterPlan
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table
from secateur.reporting.wording import binary_size, time_range


@dataclass(frozen=True, repr=False)
class ClusterPlanResult(Result):
    """The time, memory and traffic that a pruning run on a cluster would need, on paper.

    Attributes:
        model: the model.
        hardware: what a GPU is.
        plan: the figures.
    """

    model: str
    hardware: str
    plan: ClusterPlan

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        told = asdict(self)
        return {**told, "seconds": asdict(self.plan.seconds)}

    def blocks(self) -> Sequence[Block]:
        """A table of phases, one of memory, and what the figures are."""
        rows = [
            (
                phase.name,
                time_range(phase.seconds.low, phase.seconds.high),
                binary_size(round(phase.sent_bytes)) if phase.sent_bytes else "",
                binary_size(round(phase.read_bytes)) if phase.read_bytes else "",
            )
            for phase in self.plan.phases
        ]
        total = self.plan.seconds
        rows.append(("all", time_range(total.low, total.high), "", ""))
        title = f"{self.model} in {self.plan.ranks} processes on {self.hardware}"
        columns = ("phase", "time", "each process sends", "each machine reads")
        memory = [
            ("memory of each GPU", binary_size(round(self.plan.device_bytes))),
            ("host memory of each process", binary_size(round(self.plan.host_bytes))),
        ]
        return [
            Table.of(title, columns, rows),
            Table.facts("", memory),
            Line("estimated from data sheets by the formulas in docs/machines.md; nothing was run"),
        ]
