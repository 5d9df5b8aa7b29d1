"""What `report` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line


@dataclass(frozen=True, repr=False)
class ReportResult(Result):
    """The written files.

    Attributes:
        page: the report.
        plots: its charts, two files each.
        card: the model card.
    """

    page: Path
    plots: list[Path] = field(default_factory=list)
    card: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """All paths."""
        return {
            "page": str(self.page),
            "plots": [str(file) for file in self.plots],
            "card": str(self.card) if self.card else None,
        }

    def blocks(self) -> Sequence[Block]:
        """A line for each kind of file."""
        lines = [Line(f"report: {self.page}")]
        if self.plots:
            lines.append(Line(f"plots: {len(self.plots)} files in {self.plots[0].parent}"))
        if self.card:
            lines.append(Line(f"model card: {self.card}"))
        return lines
