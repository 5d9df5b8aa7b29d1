"""What `chain` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table, mib

__all__ = ["ChainResult", "Link"]


@dataclass(frozen=True)
class Link:
    """What is left after a step.

    Attributes:
        step: the verb; `source` for the model as it was.
        parameters: of the whole model.
        zeros: of its parameters.
        file_bytes: of the weight files.
        seconds: that the step took.
    """

    step: str
    parameters: int
    zeros: int
    file_bytes: int
    seconds: float

    @property
    def kept(self) -> int:
        """Parameters that are there and not zero."""
        return self.parameters - self.zeros


@dataclass(frozen=True)
class ChainResult(Result):
    """What a chain did.

    Attributes:
        links: the model as it was, and after each step.
        output: the folder written.
    """

    links: tuple[Link, ...]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        links = [{**asdict(link), "kept": link.kept} for link in self.links]
        return {"links": links, "output": str(self.output)}

    def blocks(self) -> Sequence[Block]:
        """What is left after each step, and where the result is."""
        first = self.links[0]
        rows = [
            (
                link.step,
                f"{link.parameters:,}",
                f"{link.kept:,}",
                f"{link.kept / first.kept:.1%}",
                mib(link.file_bytes),
                f"{link.file_bytes / first.file_bytes:.1%}",
                f"{link.seconds:.0f} s",
            )
            for link in self.links
        ]
        columns = ("after", "parameters", "not zero", "left", "weight files", "left", "time")
        return [
            Table.of("chain", columns, rows),
            Table.facts("", [("output", str(self.output))]),
        ]
