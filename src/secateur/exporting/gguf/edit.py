"""An edit of a GGUF file: which fields it has, and which rows of which tensors stay.

A cut is made of slices of the outermost dimension, tensors that go, new names, and tensors with
new bytes. What stays is copied byte for byte, in the types that it has, a few MiB at a time.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import (
    BLOCKS,
    MAGIC,
    SPLIT_TENSORS,
    Field,
    FilePart,
    GGUFSource,
    StoredTensor,
    block_bytes,
    counted,
    part_name,
    runs_of,
)
from secateur.progress import Progress, Silent
from secateur.runs.ledger import Ledger
from secateur.runs.output import writing

VERSION = 3
COPIED_BYTES = 2**22
"""So much is copied at once."""
SYNCED_BYTES = 2**28
"""After so many bytes they are brought to the disk, which a kill in the meantime loses."""
IN_KERNEL_BYTES = 2**17
"""Shorter runs of rows go through memory, many of them at once."""

_Piece = bytes | list[tuple[int, int]]
"""At most 4 MiB of the result: bytes, or runs of the source, each by its begin and length."""


@dataclass(frozen=True)
class Kept:
    """A tensor of the result.

    Attributes:
        source: its name in the source.
        rows: the rows of its outermost dimension, in their new order; None for all.
        replaced: makes new bytes, at once or piece by piece, for a tensor that is no slice.
        shape: of a replaced tensor, outermost first, where it is not that of the source.
        type: of a replaced tensor, where it is not that of the source.
    """

    source: str
    rows: tuple[int, ...] | None = None
    replaced: Callable[[], Any] | None = None
    shape: tuple[int, ...] | None = None
    type: GGMLQuantizationType | None = None

    def foreseen(self, name: str, source: GGUFSource) -> StoredTensor:
        """The tensor as it will be, except for its place."""
        stored = source.tensors[self.source]
        rows, *others = stored.shape
        kind = stored.type if self.type is None else self.type
        shape = self.shape or (rows if self.rows is None else len(self.rows), *others)
        if not all(0 <= row < rows for row in self.rows or ()):
            raise ValueError(f"{name}: a row is not among the {rows} of {self.source}")
        if 0 in shape or shape[-1] % BLOCKS[kind][0]:
            raise ValueError(f"{name} has the shape {shape}")
        return replace(stored, name=name, shape=shape, type=kind, nbytes=block_bytes(shape, kind))


@dataclass(frozen=True)
class Edit:
    """What the result has.

    Attributes:
        fields: its metadata, in order.
        tensors: by their names in the result, in order.
    """

    fields: Mapping[str, Field]
    tensors: Mapping[str, Kept]

    @classmethod
    def of(cls, source: GGUFSource) -> Edit:
        """Everything stays."""
        return cls(dict(source.fields), {name: Kept(name) for name in source.tensors})

    def bytes_in(self, source: GGUFSource) -> int:
        """The bytes of the result."""
        return sum(part.nbytes for part in _parts(source, self))

    def foreseen(self, source: GGUFSource) -> GGUFSource:
        """The result as it will be read, except for the places of its tensors."""
        tensors = {name: kept.foreseen(name, source) for name, kept in self.tensors.items()}
        return replace(source, fields=dict(self.fields), tensors=tensors)


def written(
    source: GGUFSource,
    edit: Edit,
    output: Path,
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> list[Path]:
    """Write the result. A source in parts gives a result in as many parts, with the same tensors.

    Args:
        source: is only read.
        edit: of it.
        output: the file; of a result in parts, `NAME.gguf` for `NAME-00001-of-0000N.gguf`.
        progress: receives the steps, each of 4 MiB.
        ledger: of a run that can be resumed. What it says is there is not written again.

    Returns:
        The files, the first part first.

    Raises:
        CheckpointError: the source became shorter.
        RecipeError: the output cannot be written.
        MemoryBudgetError: the disk is full.
    """
    progress, ledger = progress or Silent(), ledger or Ledger()
    parts = _parts(source, edit)
    steps = sum(part.nbytes for part in parts) // COPIED_BYTES
    progress.start(f"writing {output.name}", max(1, steps))
    files = [part_name(output, number, len(parts)) for number in range(len(parts))]
    done = {entry["file"]: entry["bytes"] for entry in ledger.entries}
    for file, part in zip(files, parts, strict=True):
        with writing(file):
            _write(file, part, done.get(file.name, 0), progress, ledger)
    progress.finish()
    return files


@dataclass(frozen=True)
class _PartLayout:
    """One file of the result.

    Attributes:
        header: with the padding before the first tensor.
        tensors: in order, each with its bytes in the result.
        part: of the source, that has them.
    """

    header: bytes
    tensors: list[tuple[Kept, int]]
    part: FilePart

    @property
    def nbytes(self) -> int:
        """Of the file."""
        padded = (nbytes + -nbytes % self.part.alignment for _, nbytes in self.tensors)
        return len(self.header) + sum(padded)

    def pieces(self) -> Iterator[_Piece]:
        """The bytes of the file, in pieces that are the same in each run."""
        yield self.header
        for kept, nbytes in self.tensors:
            if kept.replaced is None:
                yield from _copied(self.part.tensors[kept.source], kept.rows)
            else:
                yield from _made(kept.source, kept.replaced(), nbytes)
            yield bytes(-nbytes % self.part.alignment)


def _made(name: str, made: Any, nbytes: int) -> Iterator[bytes]:
    """The new bytes of a tensor."""
    for piece in made if isinstance(made, Iterator) else [made]:
        view = memoryview(piece).cast("B")
        nbytes -= len(view)
        yield from (bytes(view[at : at + COPIED_BYTES]) for at in range(0, len(view), COPIED_BYTES))
    if nbytes:
        raise ValueError(f"{name} has {-nbytes} bytes too many")


def _copied(tensor: StoredTensor, rows: Sequence[int] | None) -> Iterator[list[tuple[int, int]]]:
    """The rows of a tensor that stay. Neighbours are one run; short runs are read together."""
    runs = [(0, tensor.nbytes)]
    if rows is not None:
        size = tensor.row_bytes
        runs = [(first * size, count * size) for first, count in runs_of(rows)]
    waiting: list[tuple[int, int]] = []
    free = COPIED_BYTES
    for begin, length in runs:
        while length:
            now = min(length, free)
            waiting.append((tensor.offset + begin, now))
            begin, length, free = begin + now, length - now, free - now
            if not free:
                yield waiting
                waiting, free = [], COPIED_BYTES
    yield waiting


def _parts(source: GGUFSource, edit: Edit) -> list[_PartLayout]:
    """The files of the result, part for part as in the source."""
    found, foreseen = [], edit.foreseen(source).tensors
    for number, part in enumerate(source.parts):
        fields = dict(part.fields if number else edit.fields)
        if SPLIT_TENSORS in fields:
            fields[SPLIT_TENSORS] = fields[SPLIT_TENSORS].like(len(edit.tensors))
        own = {name: kept for name, kept in edit.tensors.items() if kept.source in part.tensors}
        described, offset, sizes = [], 0, []
        for name, kept in own.items():
            made = foreseen[name]
            described.append(
                counted(name)
                + struct.pack(f"<I{len(made.shape)}Q", len(made.shape), *reversed(made.shape))
                + struct.pack("<IQ", made.type, offset)
            )
            sizes.append((kept, made.nbytes))
            offset += made.nbytes + -made.nbytes % part.alignment
        head = MAGIC + struct.pack("<IQQ", VERSION, len(own), len(fields))
        keys = [counted(key) + field.encoded() for key, field in fields.items()]
        header = b"".join([head, *keys, *described])
        found.append(_PartLayout(header + bytes(-len(header) % part.alignment), sizes, part))
    return found


def _write(file: Path, part: _PartLayout, done: int, progress: Progress, ledger: Ledger) -> None:
    """Write one file of the result, from where an earlier run has stopped.

    Args:
        file: to write.
        part: what it has.
        done: so many bytes are on the disk.
        progress: receives the steps.
        ledger: receives how many bytes are on the disk.
    """

    def sync(at: int, earlier: Future[None] | None) -> None:
        if earlier is not None:
            earlier.result()  # after an error, nothing counts as written
        os.fsync(made.fileno())
        ledger.append({"file": file.name, "bytes": at})

    at, synced = 0, done
    pending: Future[None] | None = None
    with (
        FileIO(part.part.file) as source,
        FileIO(file, "r+" if done else "w") as made,
        ThreadPoolExecutor(1) as thread,  # brings bytes to the disk while more are written
    ):
        made.truncate(done)
        made.seek(done)
        for piece in part.pieces():
            before = at
            at += len(piece) if isinstance(piece, bytes) else sum(length for _, length in piece)
            progress.step(at // COPIED_BYTES - before // COPIED_BYTES)
            if at > done:
                _put(made, source, piece)
            if at - synced >= SYNCED_BYTES:
                pending, synced = thread.submit(sync, at, pending), at
        if at > synced:
            pending = thread.submit(sync, at, pending)
    if pending is not None:
        pending.result()


def _put(made: FileIO, source: FileIO, piece: _Piece) -> None:
    """Write a piece. A long run is copied by the system, if it does that between these disks."""
    if isinstance(piece, bytes):
        view = memoryview(piece)
        while view:
            view = view[made.write(view) :]
        return
    if len(piece) == 1:
        [(begin, length)] = piece
        with contextlib.suppress(OSError, AttributeError):  # what is left goes through memory
            while length >= IN_KERNEL_BYTES:
                copied = os.copy_file_range(source.fileno(), made.fileno(), length, begin)
                if not copied:
                    break
                begin, length = begin + copied, length - copied
        piece = [(begin, length)]
    _put(made, source, b"".join(_read(source, *run) for run in piece))


def _read(source: FileIO, begin: int, length: int) -> bytes:
    """Bytes of the source."""
    source.seek(begin)
    found = source.read(length)
    if len(found) < length:
        raise damaged("the file became shorter while it was copied", source.name)
    return found
