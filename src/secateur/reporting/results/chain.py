"""What `chain` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.reporting.results.next_steps import after_a_dense_folder, after_a_packed_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table
from secateur.reporting.wording import binary_size
from secateur.runs.records import ChainStep


@dataclass(frozen=True, repr=False)
class ChainResult(Result):
    """The model after each step of a chain.

    Attributes:
        links: the model at the start, and after each step.
        output: the output folder.
    """

    links: tuple[ChainStep, ...]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"links": [link.to_json() for link in self.links], "output": str(self.output)}

    def blocks(self) -> Sequence[Block]:
        """Sizes after each step, and where the result is."""
        first = self.links[0]
        rows = [
            (
                link.step,
                f"{link.parameters:,}",
                f"{link.kept:,}",
                f"{link.kept / first.kept:.1%}",
                binary_size(link.file_bytes),
                f"{link.file_bytes / first.file_bytes:.1%}",
                f"{link.seconds:.0f} s",
            )
            for link in self.links
        ]
        columns = ("after", "parameters", "not zero", "left", "weight files", "left", "time")
        return [
            Table.of("chain", columns, rows),
            Table.facts("", [("output", str(self.output))]),
            *self.next_steps(),
        ]

    def next_steps(self) -> list[Block]:
        """Commands for the folder that the last step made."""
        if self.links[-1].step == "compress":
            return after_a_packed_folder(self.output)
        return after_a_dense_folder(self.output, self.links[-1].zeros)
