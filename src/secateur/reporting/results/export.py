"""What `export` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.exporting import Exported
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """The files of an export.

    Attributes:
        target: the name of the target.
        type: how matrices are stored.
        output: the folder of the files.
        files: their names.
        exported: sizes, types and zeros.
        seconds: wall time.
    """

    target: str
    type: str
    output: Path
    files: tuple[str, ...]
    exported: Exported
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "target": self.target,
            "type": self.type,
            "output": str(self.output),
            "files": list(self.files),
            **asdict(self.exported),
            "seconds": self.seconds,
        }

    def blocks(self) -> Sequence[Block]:
        """One table, then the notes."""
        made = self.exported
        types = ", ".join(f"{count} {name}" for name, count in sorted(made.types.items()))
        share = made.zeros / made.weights if made.weights else 0.0
        rows = [
            ("files", ", ".join(str(self.output / name) for name in self.files)),
            ("size", binary_size(made.file_bytes)),
            ("tensors", types),
            ("zeros in the matrices", f"{share:.2%}"),
            ("zeros kept exactly", f"{made.zeros_kept:,} of {made.zeros:,}"),
            ("time", f"{self.seconds:.1f} s"),
        ]
        rows += [("note", note) for note in made.notes]
        return [Table.facts(f"exported to {self.target}, {self.type}", rows)]
