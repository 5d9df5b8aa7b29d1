"""The hidden states between two decoder layers, for all calibration windows.

They are in memory, or in a file if they do not fit. With a run folder, the inputs of the current
layer are always on disk as well, complete and under their final name. A killed run resumes from
this file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from secateur.models.checkpoint import read_all, write_all
from secateur.runs.output import cannot_write

__all__ = ["Activations"]


class Activations:
    """Inputs of the current layer, and the outputs that replace them.

    Args:
        shape: (samples, sequence_length, hidden_size).
        dtype: dtype of the computation.
        folder: folder of the files; None for a run in memory only.
        in_memory: whether they are in memory (as well).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path | None,
        in_memory: bool,
    ) -> None:
        self.shape, self.dtype, self.folder, self.in_memory = shape, dtype, folder, in_memory
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self.held = torch.empty(shape, dtype=dtype) if in_memory else None
        self.layer = 0

    def file(self, layer: int) -> Path:
        """The file that holds the inputs of a layer."""
        assert self.folder is not None
        return self.folder / f"inputs-{layer:04d}.bin"

    def has(self, layer: int) -> bool:
        """Whether the inputs of this layer are complete on disk."""
        return self.folder is not None and self.file(layer).exists()

    def resume(self, layer: int) -> None:
        """Continue with the stored inputs of a layer."""
        self.layer = layer
        if self.held is not None:
            for row in range(self.shape[0]):
                self.held[row] = self.from_file(self.file(layer), slice(row, row + 1))[0]

    def read(self, rows: slice) -> Tensor:
        """The inputs of the current layer for some windows: [rows, sequence_length, hidden]."""
        if self.held is not None:
            return self.held[rows]
        return self.from_file(self.file(self.layer), rows)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Store the outputs of the current layer for some windows.

        In memory they overwrite the inputs of these windows, which are no longer needed.
        """
        if self.held is not None:
            self.held[rows] = hidden
            return
        file = self.unfinished()
        try:
            with open(os.open(file, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as stream:
                stream.seek(rows.start * self.row_bytes)
                write_all(stream, hidden.to("cpu", self.dtype).contiguous())
        except OSError as error:
            raise cannot_write(error, file) from error

    def advance(self, layer: int) -> None:
        """Make the newly stored outputs the inputs of `layer`, and sync them to disk."""
        self.layer = layer
        if self.folder is None:
            return
        file = self.unfinished()
        try:
            if self.held is not None:
                with file.open("wb", buffering=0) as stream:
                    write_all(stream, self.held)
            file.rename(self.file(layer))
        except OSError as error:
            raise cannot_write(error, file) from error

    def forget(self, layer: int) -> None:
        """Delete the inputs of a finished layer."""
        if self.folder is not None:
            self.file(layer).unlink(missing_ok=True)

    def unfinished(self) -> Path:
        """The temporary file of the outputs, until all are written."""
        assert self.folder is not None
        return self.folder / "outputs.unfinished"

    def from_file(self, file: Path, rows: slice) -> Tensor:
        """Read some windows from a file."""
        hidden = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek(rows.start * self.row_bytes)
            read_all(stream, hidden)
        return hidden
