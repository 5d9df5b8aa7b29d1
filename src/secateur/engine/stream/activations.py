"""The hidden states between two decoder layers, for all calibration windows.

They are in memory, or in a file if they do not fit. With a run folder, the inputs of the current
layer are always on disk as well, complete and under their final name. A killed run resumes from
these files.

Each process of a run has the states of its own windows, and writes them to a file of its own. The
file's name has the range of windows, so any number of processes can resume: each takes the states
of its windows from the files that have them.

A halted forward holds tensors in its Python frames, where they have no name. `LiveTensors` watches
every operation, so it knows the storages that are still alive. The memory plan counts their bytes
in a rehearsal on the meta device. A run with little memory moves them to disk (or, from a GPU, to
host memory) until the forward continues (`ActivationOffload`). Such a storage is resized to zero
bytes in place, as in sharded training, so every view of it is valid again afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        self.shape, self.dtype, self.in_memory = shape, dtype, in_memory
        self.folder, self.on_disk = folder or Path(), folder is not None
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self.own = own or slice(0, shape[0])
        held = (self.own.stop - self.own.start, *shape[1:])
        self.held = torch.empty(held, dtype=dtype, device=home) if in_memory else None
        self.layer = 0

    def file(self, layer: int) -> Path:
        """The file that holds the inputs of a layer for the windows of this process."""
        return self.folder / f"inputs-{layer:04d}.{self.own.start}-{self.own.stop}.bin"

    def files(self, layer: int) -> dict[Path, range]:
        """All files with inputs of a layer, and the windows of each."""
        if not self.on_disk:
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
        if not self.on_disk or self.own.start == self.own.stop:
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
        if not self.on_disk:
            return
        kept = self.files(layer)
        for file in self.folder.glob("inputs-*.bin"):
            if file not in kept:
                file.unlink()

    def unfinished(self) -> Path:
        """The temporary file of the outputs, until all are written."""
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


class LiveTensors(TorchDispatchMode):
    """Watches operations, and tracks which of their result storages are alive.

    Args:
        permanent: tensors whose storages are never counted (weights, shared arguments).
        find_peak: update `peak_bytes` after every operation, which costs a count each time.
    """

    def __init__(self, permanent: Iterable[Tensor], *, find_peak: bool = False) -> None:
        super().__init__()
        self.find_peak = find_peak
        self.permanent = {t.untyped_storage()._cdata for t in permanent}
        self.current: dict[int, StorageWeakRef] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.note(value)
        if self.find_peak:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out

    def note(self, tensor: Tensor) -> None:
        """Count this tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.permanent:
            self.current[storage._cdata] = StorageWeakRef(storage)

    def live(self) -> list[torch.UntypedStorage]:
        """The storages that are still alive."""
        alive = {key: ref for key, ref in self.current.items() if not ref.expired()}
        self.current = alive
        storages = [torch.UntypedStorage._new_with_weak_ptr(r.cdata) for r in alive.values()]
        return [s for s in storages if s is not None]

    def live_bytes(self) -> int:
        """The size of all storages that are still alive."""
        return sum(storage.nbytes() for storage in self.live())


class ActivationOffload:
    """Moves the tensors of halted forwards out of memory, and back.

    Args:
        permanent: tensors that do not move: weights, shared arguments.
        folder: takes the tensors; None to move them to host memory (for forwards on a GPU).
        device: where forwards run. Only tensors on this device are moved: a forward on a GPU also
            reads host tensors that all forwards share, such as the hidden states of all windows.
        first: number of the first forward among those of all processes that use the folder.
    """

    def __init__(
        self,
        permanent: Iterable[Tensor],
        folder: Path | None,
        device: torch.device,
        first: int = 0,
    ) -> None:
        self.live = LiveTensors(permanent)
        self.folder, self.on_disk = folder or Path(), folder is not None
        self.device, self.first = device, first
        self.alive: dict[int, dict[int, StorageWeakRef]] = {}
        self.moved: dict[int, list[tuple[torch.UntypedStorage, int]]] = {}
        self.saved: dict[int, list[Tensor]] = {}

    def store(self, forward: int) -> None:
        """Free the memory of all tensors that the halted forward keeps alive."""
        storages = [
            storage
            for storage in self.live.live()
            if storage.nbytes() and storage.device.type == self.device.type
        ]
        self.alive[forward] = self.live.current
        self.moved[forward] = [(storage, storage.nbytes()) for storage in storages]
        if not self.on_disk:
            self.saved[forward] = [_content(s).to("cpu", copy=True) for s in storages]
        else:
            with self.file(forward).open("wb", buffering=0) as stream:
                for storage in storages:
                    write_all(stream, _content(storage).cpu())
        for storage in storages:
            storage.resize_(0)

    def restore(self, forward: int) -> None:
        """Fill the storages of a halted forward again, and resume watching it."""
        self.live.current = self.alive.get(forward, {})
        if forward not in self.moved:
            return
        kept = self.moved.pop(forward)
        for storage, size in kept:
            storage.resize_(size)
        if not self.on_disk:
            for (storage, _), saved in zip(kept, self.saved.pop(forward), strict=True):
                _content(storage).copy_(saved)
            return
        with self.file(forward).open("rb", buffering=0) as stream:
            for storage, size in kept:
                host = torch.empty(size, dtype=torch.uint8)
                read_all(stream, host)
                _content(storage).copy_(host)
        self.file(forward).unlink()

    def file(self, forward: int) -> Path:
        """The file of one halted forward."""
        return self.folder / f"parked-{self.first + forward:05d}.bin"


def _content(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage as a tensor that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
