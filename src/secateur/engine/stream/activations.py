"""The hidden states between two decoder layers, for all calibration windows.

They are in memory, or in a file if they do not fit. With a run folder, the inputs of the current
layer are always on disk as well, complete and under their final name. A killed run resumes from
these files.

Each process of a run has the states of its own windows, and writes them to a file of its own. The
file's name has the range of windows, so any number of processes can resume: each takes the states
of its windows from the files that have them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.checkpoint import read_all, write_all
from secateur.runs.output import cannot_write

HOST = torch.device("cpu")
RANGE = re.compile(r"\.(\d+)-(\d+)\.bin")
"""The windows in the name of a file: the first one, and the one after the last."""


class Activations:
    """Inputs of the current layer, and the outputs that replace them.

    Args:
        shape: (samples, sequence_length, hidden_size).
        dtype: dtype of the computation.
        folder: folder of the files; None for a run in memory only.
        in_memory: whether they are in memory (as well).
        own: the windows of this process; None for all. All other ranges of windows are within it.
        home: in whose memory they are: the host's or a GPU's.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path | None,
        in_memory: bool,
        own: slice | None = None,
        *,
        home: torch.device = HOST,
    ) -> None:
        self.shape, self.dtype, self.folder, self.in_memory = shape, dtype, folder, in_memory
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self.own = own or slice(0, shape[0])
        held = (self.own.stop - self.own.start, *shape[1:])
        self.held = torch.empty(held, dtype=dtype, device=home) if in_memory else None
        self.layer = 0

    def file(self, layer: int) -> Path:
        """The file that holds the inputs of a layer for the windows of this process."""
        assert self.folder is not None
        return self.folder / f"inputs-{layer:04d}.{self.own.start}-{self.own.stop}.bin"

    def files(self, layer: int) -> dict[Path, range]:
        """All files with inputs of a layer, and the windows of each."""
        if self.folder is None:
            return {}
        found = {}
        for file in sorted(self.folder.glob(f"inputs-{layer:04d}.*.bin")):
            named = RANGE.search(file.name)
            if named is not None:
                found[file] = range(int(named[1]), int(named[2]))
        return found

    def has(self, layer: int) -> bool:
        """Whether the inputs of this layer are on disk, for all windows of this process."""
        stored = self.files(layer).values()
        return all(
            any(row in rows for rows in stored) for row in range(self.own.start, self.own.stop)
        )

    def resume(self, layer: int) -> None:
        """Continue with the stored inputs of a layer."""
        self.layer = layer
        if self.held is not None:
            for row in range(self.own.start, self.own.stop):
                self.held[row - self.own.start] = self.stored(slice(row, row + 1))[0]

    def read(self, rows: slice) -> Tensor:
        """The inputs of the current layer for some windows: [rows, sequence_length, hidden]."""
        if self.held is not None:
            return self.held[self.within(rows)]
        return self.stored(rows)

    def stored(self, rows: slice) -> Tensor:
        """The inputs of the current layer on disk, for some windows."""
        own = self.file(self.layer)
        if own.exists():
            return self.from_file(own, rows, self.own.start)
        files = self.files(self.layer)  # of processes that have shared the windows in another way
        found = []
        for row in range(rows.start, rows.stop):
            file = next(file for file, there in files.items() if row in there)
            found.append(self.from_file(file, slice(row, row + 1), files[file].start))
        return torch.cat(found)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Store the outputs of the current layer for some windows.

        In memory they overwrite the inputs of these windows, which are no longer needed.
        """
        if self.held is not None:
            self.held[self.within(rows)] = hidden
            return
        file = self.unfinished()
        try:
            with open(os.open(file, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as stream:
                stream.seek(self.within(rows).start * self.row_bytes)
                write_all(stream, hidden.to("cpu", self.dtype).contiguous())
        except OSError as error:
            raise cannot_write(error, file) from error

    def advance(self, layer: int) -> None:
        """Make the newly stored outputs the inputs of `layer`, and sync them to disk."""
        self.layer = layer
        if self.folder is None or self.own.start == self.own.stop:
            return
        file = self.unfinished()
        try:
            if self.held is not None:
                with file.open("wb", buffering=0) as stream:
                    for row in self.held:  # from a GPU, one window at a time
                        write_all(stream, row.cpu())
            file.rename(self.file(layer))
        except OSError as error:
            raise cannot_write(error, file) from error

    def forget(self, layer: int) -> None:
        """Delete the inputs of a finished layer, also those that other processes have stored."""
        for file in self.files(layer):
            file.unlink(missing_ok=True)

    def forget_all_but(self, layer: int) -> None:
        """Delete what stopped runs have stored, except the inputs of a layer."""
        if self.folder is None:
            return
        kept = self.files(layer)
        for file in self.folder.glob("inputs-*.bin"):
            if file not in kept:
                file.unlink()

    def unfinished(self) -> Path:
        """The temporary file of the outputs, until all are written."""
        assert self.folder is not None
        return self.folder / f"outputs.{self.own.start}-{self.own.stop}.unfinished"

    def within(self, rows: slice) -> slice:
        """A range of windows, counted from the first window of this process."""
        return slice(rows.start - self.own.start, rows.stop - self.own.start)

    def from_file(self, file: Path, rows: slice, first: int) -> Tensor:
        """Read some windows from a file whose first window is `first`."""
        hidden = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek((rows.start - first) * self.row_bytes)
            read_all(stream, hidden)
        return hidden
