"""Finds the tensors that a forward keeps alive, and moves them out of memory.

A halted forward holds tensors in its Python frames, where they have no name. `LiveTensors` watches
every operation, so it knows the storages that are still alive. The memory plan counts their bytes
in a rehearsal on the meta device. A run with little memory moves them to disk (or, from a GPU, to
host memory) until the forward continues. Such a storage is resized to zero bytes in place, as in
sharded training, so every view of it is valid again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.models.checkpoint import read_all, write_all


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
        self.folder, self.device, self.first = folder, device, first
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
        if self.folder is None:
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
        if self.folder is None:
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
        assert self.folder is not None
        return self.folder / f"parked-{self.first + forward:05d}.bin"


def _content(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage as a tensor that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
