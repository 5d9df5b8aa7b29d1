"""The ledger of a run has one line for each finished layer, so that a killed run can resume.

A line is written only after the layer's weights are on disk, and the next layer's inputs if they
are stored. A line that a kill has cut off is dropped, and its layer is repeated.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from secateur.runs.records import Layer


class Ledger:
    """Append-only record of a run.

    Args:
        file: of the ledger; None for a run only in memory.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []

    @property
    def layers(self) -> list[Layer]:
        """The records of finished layers, in order of completion."""
        lines = (entry for entry in self.entries if "layer" in entry)
        return [Layer.model_validate(entry, extra="ignore") for entry in lines]

    @property
    def begun(self) -> bool:
        """Whether an earlier run has started this ledger."""
        return self.file is not None and self.file.exists()

    def begin(self) -> None:
        """Start a new ledger."""
        self.entries = []
        if self.file is not None:
            self.file.write_bytes(b"")

    def resume(self) -> int:
        """Read an earlier run's ledger; returns how many layers are finished."""
        assert self.file is not None
        self.entries = []
        whole = 0
        for line in self.file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # cut off by a kill
                break
            self.entries.append(json.loads(line))
            whole += len(line)
        os.truncate(self.file, whole)
        return len(self.layers)

    def back_to(self, count: int) -> None:
        """Drop all lines but those of the first `count` layers."""
        if len(self.entries) == count:
            return
        kept, self.entries = self.entries[:count], []
        self.begin()
        for entry in kept:
            self.append(entry)

    def finish_layer(self, layer: Layer) -> None:
        """Record a finished layer."""
        self.append(layer.to_json())

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line so that it survives a power cut."""
        self.entries.append(entry)
        if self.file is None:
            return
        with self.file.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
