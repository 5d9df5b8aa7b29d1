"""An edit of a GGUF file: which fields it has, and which rows of which tensors stay.

A cut is made of slices of the outermost dimension, tensors that go, new names, and tensors with
new bytes. What stays is copied byte for byte, in the types that it has, a few MiB at a time.
"""

from __future__ import annotations

import errno
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
    ALIGNMENT,
    BLOCKS,
    MAGIC,
    PART,
    SPLIT_TENSORS,
    Field,
    FilePart,
    GGUFSource,
    StoredTensor,
    block_bytes,
    counted,
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
NO_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""The errors of systems that cannot copy from one file into another by themselves."""


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

    def shape_in(self, source: GGUFSource) -> tuple[int, ...]:
        """Its shape in the result, outermost first."""
        if self.shape is not None:
            return self.shape
        [outermost, *others] = source.tensors[self.source].shape
        return (outermost if self.rows is None else len(self.rows), *others)

    def type_in(self, source: GGUFSource) -> GGMLQuantizationType:
        """Its type in the result."""
        return source.tensors[self.source].type if self.type is None else self.type

    def bytes_in(self, source: GGUFSource) -> int:
        """Its bytes in the result."""
        return block_bytes(self.shape_in(source), self.type_in(source))


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

    def with_fields(self, changed: Mapping[str, Field]) -> Edit:
        """The same with other or more fields. A known one keeps its place."""
        return replace(self, fields={**self.fields, **changed})

    def bytes_in(self, source: GGUFSource) -> int:
        """The bytes of the result."""
        return sum(part.nbytes for part in _parts(source, self))

    def foreseen(self, source: GGUFSource) -> GGUFSource:
        """The result as it will be read, except for the places of its tensors."""
        tensors = {
            name: StoredTensor(
                name, kept.shape_in(source), kept.type_in(source), source.file, 0,
                kept.bytes_in(source),
            )
            for name, kept in self.tensors.items()
        }  # fmt: skip
        return replace(source, fields=dict(self.fields), tensors=tensors)


def part_name(output: Path, number: int, count: int) -> Path:
    """The file of part `number` (from 0) of a result; of one part it is the output itself."""
    if count == 1:
        return output
    match = PART.fullmatch(output.name)
    stem = match["stem"] if match else output.stem
    return output.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf")


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
        begun = done.get(file.name, 0)
        with FileIO(part.file) as read, writing(file), _Writer(file, read, begun) as writer:
            for piece in part.pieces():
                writer.write(piece, progress)
                if writer.at - writer.synced >= SYNCED_BYTES:
                    writer.sync(ledger)
            writer.sync(ledger)
            writer.note(ledger)
    progress.finish()
    return files


@dataclass(frozen=True)
class _Runs:
    """Bytes of the source, at most 4 MiB: where each run begins, and its length."""

    runs: Sequence[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        """Of all runs."""
        return sum(length for _, length in self.runs)


@dataclass(frozen=True)
class _PartLayout:
    """One file of the result.

    Attributes:
        header: with the padding before the first tensor.
        tensors: in order, each with its bytes in the result.
        alignment: of the tensors.
        source: of the tensors.
        file: of the source, that has them.
    """

    header: bytes
    tensors: list[tuple[Kept, int]]
    alignment: int
    source: GGUFSource
    file: Path

    @property
    def nbytes(self) -> int:
        """Of the file."""
        padded = (nbytes + -nbytes % self.alignment for _, nbytes in self.tensors)
        return len(self.header) + sum(padded)

    def pieces(self) -> Iterator[bytes | _Runs]:
        """The bytes of the file, in pieces that are the same in each run."""
        yield self.header
        for kept, nbytes in self.tensors:
            yield from _made(kept, nbytes) if kept.replaced else _copied(self.source, kept)
            yield bytes(-nbytes % self.alignment)


def _made(kept: Kept, nbytes: int) -> Iterator[bytes]:
    """The new bytes of a tensor."""
    assert kept.replaced is not None
    made = kept.replaced()
    pieces = made if isinstance(made, Iterator) else [made]
    for piece in pieces:
        view = memoryview(piece).cast("B")
        nbytes -= len(view)
        yield from (bytes(view[at : at + COPIED_BYTES]) for at in range(0, len(view), COPIED_BYTES))
    if nbytes:
        raise ValueError(f"{kept.source} has {-nbytes} bytes too many")


def _copied(source: GGUFSource, kept: Kept) -> Iterator[_Runs]:
    """The rows of a tensor that stay. Neighbours are one run; short runs are read together."""
    tensor = source.tensors[kept.source]
    runs = [(0, tensor.nbytes)]
    if kept.rows is not None:
        size = tensor.row_bytes
        runs = [(first * size, count * size) for first, count in runs_of(kept.rows)]
    waiting: list[tuple[int, int]] = []
    free = COPIED_BYTES
    for begin, length in runs:
        while length:
            now = min(length, free)
            waiting.append((tensor.offset + begin, now))
            begin, length, free = begin + now, length - now, free - now
            if not free:
                yield _Runs(waiting)
                waiting, free = [], COPIED_BYTES
    if waiting:
        yield _Runs(waiting)


def _parts(source: GGUFSource, edit: Edit) -> list[_PartLayout]:
    """The files of the result, part for part as in the source."""
    _check(source, edit)
    where = {name: number for number, part in enumerate(source.parts) for name in part.tensors}
    own: list[dict[str, Kept]] = [{} for _ in source.parts]
    for name, kept in edit.tensors.items():
        own[where[kept.source]][name] = kept
    found = []
    for number, part in enumerate(source.parts):
        fields = dict(part.fields if number else edit.fields)
        if SPLIT_TENSORS in fields:
            fields[SPLIT_TENSORS] = fields[SPLIT_TENSORS].like(len(edit.tensors))
        found.append(_laid_out(source, fields, own[number], part))
    return found


def _laid_out(
    source: GGUFSource, fields: Mapping[str, Field], tensors: Mapping[str, Kept], part: FilePart
) -> _PartLayout:
    """One file of the result."""
    described, offset, sizes = [], 0, []
    for name, kept in tensors.items():
        shape, nbytes = kept.shape_in(source), kept.bytes_in(source)
        described.append(
            counted(name)
            + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            + struct.pack("<IQ", kept.type_in(source), offset)
        )
        sizes.append((kept, nbytes))
        offset += nbytes + -nbytes % part.alignment
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields))
    keys = [counted(key) + field.encoded() for key, field in fields.items()]
    header = b"".join([head, *keys, *described])
    header += bytes(-len(header) % part.alignment)
    return _PartLayout(header, sizes, part.alignment, source, part.file)


def _check(source: GGUFSource, edit: Edit) -> None:
    """Refuse an edit that does not fit its source."""
    if edit.fields.get(ALIGNMENT) is not source.fields.get(ALIGNMENT):
        raise ValueError(f"an edit keeps {ALIGNMENT}")
    for name, kept in edit.tensors.items():
        tensor = source.tensors[kept.source]
        if kept.rows is not None and not all(0 <= row < tensor.shape[0] for row in kept.rows):
            raise ValueError(f"{name}: a row is not among the {tensor.shape[0]} of {kept.source}")
        weights, _ = BLOCKS[kept.type_in(source)]
        if 0 in (shape := kept.shape_in(source)) or shape[-1] % weights:
            raise ValueError(f"{name} has the shape {shape}")


class _Writer:
    """Writes one file of the result, from where an earlier run has stopped.

    Args:
        file: to write.
        source: where the bytes come from.
        done: so many bytes are on the disk.
    """

    def __init__(self, file: Path, source: FileIO, done: int) -> None:
        self.file, self.source, self.done = file, source, done
        self.at, self.synced = 0, done
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.stream = FileIO(file, "r+" if done else "w")
        self.stream.truncate(done)
        self.stream.seek(done)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()
        self.stream.close()

    def write(self, piece: bytes | _Runs, progress: Progress) -> None:
        """Write the next piece, unless it is there."""
        nbytes = len(piece) if isinstance(piece, bytes) else piece.nbytes
        before, self.at = self.at, self.at + nbytes
        progress.step(self.at // COPIED_BYTES - before // COPIED_BYTES)
        if self.at <= self.done:
            return
        if isinstance(piece, bytes):
            self.put(piece)
        elif len(piece.runs) > 1 or not self.copied_by_the_system(*piece.runs[0]):
            self.put(b"".join(self.read(*run) for run in piece.runs))

    def put(self, piece: bytes) -> None:
        """Write bytes of memory."""
        view = memoryview(piece)
        while view:
            view = view[self.stream.write(view) :]

    def copied_by_the_system(self, begin: int, length: int) -> bool:
        """Copy bytes without reading them into memory; False where the system does not do it."""
        if length < IN_KERNEL_BYTES or not hasattr(os, "copy_file_range"):
            return False
        end = begin + length
        try:
            while begin < end:
                copied = os.copy_file_range(
                    self.source.fileno(), self.stream.fileno(), end - begin, begin
                )
                if not copied:
                    raise damaged("the file became shorter while it was copied", self.source.name)
                begin += copied
        except OSError as error:
            if error.errno not in NO_COPY or begin + length > end:
                raise
            return False
        return True

    def read(self, begin: int, length: int) -> bytes:
        """Bytes of the source."""
        self.source.seek(begin)
        found = self.source.read(length)
        if len(found) < length:
            raise damaged("the file became shorter while it was copied", self.source.name)
        return found

    def sync(self, ledger: Ledger) -> None:
        """Begin to bring everything so far to the disk, while more is written."""
        self.note(ledger)
        if self.at > self.synced:
            self.synced = self.at
            self.pending = self.thread.submit(os.fsync, self.stream.fileno())

    def note(self, ledger: Ledger) -> None:
        """Wait for what is on its way to the disk, and write down that it is there."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
            ledger.append({"file": self.file.name, "bytes": self.synced})
