"""The ledger of a run: one line per finished layer, so that a killed run can go on.

A line is written only after the layer's weights and the next layer's inputs are on disk. A line
that was torn by a kill is dropped, and its layer is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import RecipeError

__all__ = ["Ledger", "write_tensors", "write_whole"]


def write_whole(file: Path, content: Any) -> None:
    """Write content as JSON into a file that is there whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.rename(file)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors into a safetensors file that is there whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    unfinished.rename(file)


class Ledger:
    """Append-only record of a run.

    Args:
        file: where it is kept; None for a run in memory only.
        fingerprint: everything the result depends on; a resumed run must have the same.
    """

    def __init__(self, file: Path | None, fingerprint: dict[str, Any]) -> None:
        self.file, self.fingerprint = file, fingerprint
        self.layers: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Start a new ledger."""
        self.layers = []
        if self.file:
            self.file.unlink(missing_ok=True)
        self.append({"fingerprint": self.fingerprint})

    def resume(self) -> int:
        """Read an earlier run's ledger; returns how many layers are finished.

        Raises:
            RecipeError: that run was another one; says in what they differ.
        """
        assert self.file is not None
        lines = []
        whole = 0
        for line in self.file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
            whole += len(line)
        os.truncate(self.file, whole)
        if not lines:
            self.begin()
            return 0
        before = lines[0]["fingerprint"]
        now = json.loads(json.dumps(self.fingerprint))
        differing = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        if differing:
            told = "; ".join(f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in differing)
            raise RecipeError(
                f"the run to resume was another one ({told})",
                where=str(self.file),
                remedy="repeat the options of the first run, or start anew with --restart",
            )
        self.entries = lines[1:]
        self.layers = [line for line in self.entries if "layer" in line]
        return len(self.layers)

    def finish_layer(
        self,
        index: int,
        records: list[dict[str, Any]],
        seconds: float,
        reconstruction: dict[str, float] | None = None,
        collapsed: dict[str, float] | None = None,
        unseen: Sequence[str] = (),
    ) -> None:
        """Enter a finished layer.

        Args:
            index: of the layer.
            records: of its linears.
            seconds: that it took.
            reconstruction: what tuning brought.
            collapsed: linears that lost their outputs.
            unseen: linears of experts that calibration did not reach, and that were left.
        """
        entry: dict[str, Any] = {"layer": index, "seconds": seconds, "linears": records}
        if reconstruction:
            entry["reconstruction"] = reconstruction
        if collapsed:
            entry["collapsed"] = collapsed
        if unseen:
            entry["unseen"] = list(unseen)
        self.layers.append(entry)
        self.append(entry)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line and make it last."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
