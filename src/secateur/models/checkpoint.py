"""Safetensors folders: read a tensor at a time, patch a copy in place, or write new files.

A pruned model has the same tensors, shapes and dtypes as its source. So the output is a byte copy
of the source in which the pruned tensors are overwritten at their offsets. All other tensors are
bit-identical by construction, and writing costs no memory.

This module reads the byte layout directly: 8 bytes, the length of the header, little-endian; the
header, JSON; the data. It does not use the memory map of the safetensors library: mapped pages
count as resident memory, and an in-place write needs the offsets.

Nothing in a header is trusted (`read_header`). Every claim is checked against the size of the file
before anything is allocated. The byte ranges must cover the data exactly, and each shape must need
exactly the bytes of its range.

A new file is written tensor by tensor, in any order, with one tensor in memory (`ShardWriter`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import FileIO
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError, NumericalError
from secateur.models.block_files import FOLDER, BlockFiles, StoredBlocks
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress, Silent
from secateur.runs.environment import usable_processors
from secateur.runs.output import writing

log = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_SIDE = 2**40
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""The escape of half of a character: one of a pair, or a fault."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
QUANT_METHOD = "secateur"
"""What the configuration of a compressed checkpoint of ours calls its form."""

PACKED_INDEX_NAME = "secateur.safetensors.index.json"
"""The index of a compressed checkpoint. transformers does not look for these file names. Otherwise
it would skip the parts of packed matrices as unknown tensors, and draw the matrices at random."""
INDEX_NAMES = (PACKED_INDEX_NAME, INDEX_NAME)
SHARD_NAME = re.compile(r"[\w .+-]{1,200}\.safetensors", re.ASCII)


PLAIN = {"format": "pt"}
"""The metadata of a file of plain weights, as transformers writes it."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 2**50
"""A number with more digits than any offset or length has."""
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors, by name."""
Described = dict[str, tuple[torch.dtype, tuple[int, ...], int]]
"""Dtype, shape and offset in the data, for each tensor."""
BLOCK_VALUES = 2**21
"""So many values does a thread have in memory while a file is checked for NaN."""
READERS = 4
"""Threads that check a file; a disk or the memory is busy with as many."""
NOT_FINITE = {
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e5m2: (0x7F, 0x7C),
    torch.float8_e8m0fnu: (0xFF, 0xFF),
}
"""For floats of one byte, which torch cannot add up: the bits besides the sign, and the lowest
pattern of these bits that is no finite number."""


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in a file.

    Attributes:
        file: it is in this file.
        offset: its first byte.
        size_bytes: of its values.
        dtype: of its values.
        shape: its sizes.
        strides: elements between neighbours along each axis, for a tensor that is a view of a
            stored one; None where its values follow each other.
    """

    file: Path
    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @classmethod
    def made(cls, file: Path, dtype: torch.dtype, shape: Sequence[int]) -> TensorEntry:
        """The entry of a tensor that is made of stored ones; its offset means nothing."""
        return cls(file, 0, prod(shape) * dtype.itemsize, dtype, tuple(shape))


class Header(dict[str, TensorEntry]):
    """The tensors of a file by name.

    Attributes:
        metadata: free text by key.
    """

    metadata: dict[str, str]


def damaged(what: str, where: object) -> CheckpointError:
    """An error about a file that contradicts itself."""
    return CheckpointError(what, where=str(where), remedy="copy or download the file again")


def parse_json(text: bytes | str) -> Any:
    """JSON in which no object names a key twice."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if SURROGATE.search(raw):
        json.dumps(found, ensure_ascii=False).encode()  # halves of a pair are written apart
    return found


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file against the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # before so many bytes are read
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise damaged(
                f"not a whole safetensors file: {size} bytes, header length {length}", file
            )
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise damaged(f"the header is not JSON: {error}", file) from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object", file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("the metadata is not a table of texts", file)
    entries = Header(
        {name: _read_entry(file, name, described, 8 + length) for name, described in header.items()}
    )
    _check_ranges(file, entries, 8 + length, size)
    entries.metadata = metadata
    return entries


def _read_entry(file: Path, name: str, described: Any, start_of_data: int) -> TensorEntry:
    """One tensor's line of the header; its shape must need exactly the bytes it has."""

    def refuse(what: str) -> CheckpointError:
        return damaged(f"tensor {name!r} {what}", file)

    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by dtype, shape and data_offsets")
    written, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(written, str) or written not in DTYPES:
        raise CheckpointError(
            f"tensor {name!r} has the unknown dtype {str(written)[:40]}", where=str(file)
        )
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS or any(s > MAX_SIDE for s in shape):
        raise refuse(f"has the impossible shape {str(shape)[:80]}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the impossible byte range {str(offsets)[:80]}")
    needed, dtype = prod(shape) * DTYPES[written].itemsize, DTYPES[written]
    if needed != offsets[1] - offsets[0]:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, its shape {shape} needs {needed}")
    return TensorEntry(file, start_of_data + offsets[0], needed, dtype, tuple(shape))


def _is_counts(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_ranges(
    file: Path, entries: Mapping[str, TensorEntry], start_of_data: int, size: int
) -> None:
    """Refuse tensors that overlap, bytes that belong to none, and a file that ends early."""
    expected = max((e.offset + e.size_bytes for e in entries.values()), default=start_of_data)
    if expected != size:
        raise damaged(f"the file has {size} bytes, its header describes {expected}", file)
    end = start_of_data
    # an empty tensor begins where the next one does, so it comes first
    for name, entry in sorted(entries.items(), key=lambda x: (x[1].offset, x[1].size_bytes)):
        if entry.offset != end:
            raise damaged(
                f"tensor {name!r} begins at byte {entry.offset}, the one before it ends at {end}",
                file,
            )
        end += entry.size_bytes


def shard_name(stem: str, number: int, count: int) -> str:
    """What the file `number` (from 1) of `count` is called, `stem` being `model` or `secateur`."""
    return (
        f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
    )


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, compressed or not, in order; each one exists."""
    index = folder / INDEX_NAME
    if (folder / PACKED_INDEX_NAME).is_file():
        if index.is_file() or (folder / SINGLE_NAME).is_file():
            raise CheckpointError(
                "the folder contains two checkpoints: a compressed one and a dense one",
                where=str(folder),
                remedy=f"remove secateur*.safetensors and {PACKED_INDEX_NAME}, or the files of the "
                "dense model, or make the compressed folder again",
            )
        index = folder / PACKED_INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise damaged(f"the index of shards cannot be read: {error!r}", index) from None
        odd = [n for n in names if not isinstance(n, str) or not SHARD_NAME.fullmatch(n)]
        if odd or not names:
            raise damaged(
                f"the index of shards names {odd[0]!r}" if odd else "it names no file", index
            )
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing)}",
                where=str(folder),
                remedy="copy or download the missing files",
            )
        return [folder / n for n in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
    if pickled:
        raise CheckpointError(
            f"the weights are pickles ({', '.join(pickled)}), which can run code when loaded",
            where=str(folder),
            remedy="convert them to safetensors where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )
    raise CheckpointError(
        f"no {SINGLE_NAME} and no {INDEX_NAME}",
        where=str(folder),
        remedy="name a folder written by save_pretrained",
    )


def read_headers(files: Sequence[Path]) -> list[Header]:
    """The headers of all files of a checkpoint, each checked against the size of its file."""
    headers = [read_header(file) for file in files]
    owner: dict[str, Path] = {}
    for file, header in zip(files, headers, strict=True):
        twice = sorted(header.keys() & owner.keys())
        if twice:
            said = f"{len(twice)} tensors are in two files; the first is {twice[0]!r}"
            raise damaged(said, f"{owner[twice[0]]} and {file.name}")
        owner |= dict.fromkeys(header, file)
    return headers


class CheckpointReader:
    """Reads a safetensors folder one tensor at a time.

    Args:
        folder: holds `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: a file is damaged or missing, or a tensor is in two of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = shard_files(folder)
        self.entries: dict[str, TensorEntry] = {}
        for header in read_headers(self.files):
            self.entries.update(header)

    @property
    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.size_bytes for entry in self.entries.values())

    @property
    def tensor_digest(self) -> str:
        """A digest of the names, shapes and dtypes of all tensors."""
        entries = sorted((n, str(e.dtype), tuple(e.shape)) for n, e in self.entries.items())
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def by_file(self) -> dict[Path, dict[str, TensorEntry]]:
        """The tensors of each file, in the order of the files."""
        found: dict[Path, dict[str, TensorEntry]] = {file: {} for file in self.files}
        for name, entry in self.entries.items():
            found[entry.file][name] = entry
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return read_entry(self.entries[name])

    @cached_property
    def _block_files(self) -> BlockFiles:
        return BlockFiles(self.folder)

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks of a matrix, if the folder has them and they give its numbers."""
        found = self._block_files.read(name)
        if found is None:
            return None
        weight = self.read(name)
        return found if torch.equal(found.stored.to(weight.dtype), weight) else None

    def split(self, name: str, views: Mapping[str, Tensor]) -> None:
        """From now on, show a tensor as several tensors, each a view of it.

        Args:
            name: of the tensor; the reader no longer shows it.
            views: by name, views of a tensor on the meta device that has the shape of the stored
                one. Together they hold each of its values once.
        """
        entry = self.entries[name]
        taken = sorted(views.keys() & self.entries.keys())
        if taken or sum(view.nbytes for view in views.values()) != entry.size_bytes:
            said = f"{name} of shape {entry.shape} is not made of {len(views)} equal parts"
            raise damaged(f"{name} is stored, and so is {taken[0]}" if taken else said, entry.file)
        del self.entries[name]
        for part, view in views.items():
            self.entries[part] = TensorEntry(
                entry.file,
                entry.offset + int(view.storage_offset()) * entry.dtype.itemsize,
                view.nbytes,
                entry.dtype,
                tuple(view.shape),
                None if view.is_contiguous() else view.stride(),
            )

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as views of the file: only pages that are read take memory."""
        from safetensors import safe_open

        for file in self.files:
            own = [n for n in names if self.entries[n].file == file]
            if own:
                with safe_open(file, framework="pt") as opened:
                    for name in own:
                        yield name, opened.get_tensor(name)


class Float32Reader(CheckpointReader):
    """Reads the floating-point tensors of a checkpoint as float32, exactly."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = self.entries
        self.entries = {
            name: TensorEntry.made(entry.file, torch.float32, entry.shape)
            if entry.dtype.is_floating_point
            else entry
            for name, entry in self.stored.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return read_entry(self.stored[name]).to(self.entries[name].dtype)


def read_entry(entry: TensorEntry) -> Tensor:
    """The tensor at a place in a file, in memory of its own."""
    with entry.file.open("rb", buffering=0) as stream:
        _, tensor = _read_span(stream, entry)
    return tensor if entry.strides is None else tensor.contiguous()


def _read_span(stream: FileIO, entry: TensorEntry) -> tuple[Tensor, Tensor]:
    """All values from the first to the last one of a tensor in a file, and the tensor among them.

    Of a view that is not contiguous, values of other tensors lie between its own: of an expert's
    gate those of its up, so the span is at most twice as large.
    """
    if entry.strides is None:
        whole = torch.empty(entry.shape, dtype=entry.dtype)
    else:
        last = sum((n - 1) * step for n, step in zip(entry.shape, entry.strides, strict=True))
        whole = torch.empty(last + 1 if 0 not in entry.shape else 0, dtype=entry.dtype)
    stream.seek(entry.offset)
    read_all(stream, whole)
    tensor = whole if entry.strides is None else whole.as_strided(entry.shape, entry.strides)
    return whole, tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy; valid while it lives.

    It does not use numpy, because torch never resizes a storage again that numpy has seen, and the
    storages of halted forwards are resized when they move to disk.
    """
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def read_all(stream: FileIO, tensor: Tensor) -> None:
    """Fill a contiguous CPU tensor from an unbuffered file, from its current position."""
    view = as_bytes(tensor)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise CheckpointError(
                f"the file ends {len(view) - done} bytes early", where=stream.name
            )
        done += count


def write_all(stream: FileIO, tensor: Tensor) -> None:
    """Write the bytes of a contiguous CPU tensor to an unbuffered file, at its current position."""
    view = as_bytes(tensor)
    done = 0
    while done < len(view):
        done += stream.write(view[done:])


def copied_files(folder: Path) -> list[Path]:
    """The files of a model other than its weights: configuration, tokenizer, licence."""
    suffixes = {".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"}
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_file()
        and (p.suffix in suffixes or p.name.upper().startswith(("LICENSE", "NOTICE")))
    )


def note_links(files: Iterable[Path]) -> None:
    """Log the symbolic links among files that lead out of their folder; their content is copied.

    The links of a hub snapshot lead to the blobs of the same model and are not named.
    """
    for file in files:
        target = file.resolve()
        blobs = file.parent.resolve().parent.parent / "blobs"
        if file.is_symlink() and target.parent not in (file.parent.resolve(), blobs):
            log.warning("%s is a link to %s: its content is copied into the result", file, target)


def copy_others(source: Path, folder: Path, left_out: Iterable[str]) -> None:
    """Copy the files of a model other than its weights, but for some; replace those that are there.

    Args:
        source: of the model.
        folder: receives the copies.
        left_out: names of files.
    """
    files = [file for file in copied_files(source) if file.name not in {*left_out}]
    note_links(files)
    for file in files:
        (folder / file.name).unlink(missing_ok=True)
        shutil.copyfile(file, folder / file.name)


class PatchedCopy:
    """A copy of a checkpoint whose tensors can be overwritten in place."""

    def __init__(self, source: CheckpointReader, folder: Path) -> None:
        self.source, self.folder = source, folder
        self._dirty: set[Path] = set()

    def create(self, progress: Progress | None = None) -> None:
        """Copy all files, and replace files of the same names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [*copied_files(self.source.folder), *self.source.files]
        note_links(files)
        sizes = {file: file.stat().st_size // 2**20 for file in files}
        progress = progress or Silent()
        progress.start("copying", max(1, sum(sizes.values())))
        with writing(self.folder):
            for file in files:
                target = self.folder / file.name
                target.unlink(missing_ok=True)
                shutil.copyfile(file, target)
                self._dirty.add(target)
                progress.step(sizes[file], note=file.name)
            if (self.source.folder / FOLDER).is_dir():
                blocks = self.folder / FOLDER
                shutil.copytree(self.source.folder / FOLDER, blocks, dirs_exist_ok=True)
            progress.finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor; it is cast to the stored dtype."""
        entry = self.source.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)} where {entry.shape} is stored",
                where=str(entry.file),
            )
        file = self.folder / entry.file.name
        with writing(file), file.open("r+b", buffering=0) as stream:
            values = tensor.detach().to("cpu", entry.dtype)
            if entry.strides is not None:
                whole, own = _read_span(stream, entry)
                own.copy_(values)  # a view: the values of others between its own are written too
                values = whole
            stream.seek(entry.offset)
            write_all(stream, values.contiguous())
        self._dirty.add(file)

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        for file in self._dirty:
            with file.open("r+b") as stream:  # Windows syncs only what may be written
                os.fsync(stream.fileno())
        self._dirty.clear()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors."""
    return NAMES[dtype]


class ShardWriter:
    """Writes one safetensors file, tensor by tensor, in any order.

    The header comes before the data and describes it, so its length must be known first. Tensors
    with known dtype and shape get their place at once, larger dtypes first, so that each is aligned
    to its own size. Tensors whose length is not known yet (compressed ones) follow in the order of
    writing. The header is written last: until then no program can mistake the file for a complete
    one.

    Args:
        file: written over.
        known: dtype and shape of the tensors where they are known.
        appended: names of the tensors of bytes whose length is not known yet.
        longest_metadata: metadata at least as long as the one for `close`.
    """

    def __init__(
        self, file: Path, known: Specs, appended: list[str], longest_metadata: Mapping[str, str]
    ) -> None:
        self.file = file
        self.placed: Described = {}
        self.end = 0
        # larger dtypes first: then every offset is a multiple of its dtype's size
        for name, (dtype, shape) in sorted(known.items(), key=lambda x: -x[1][0].itemsize):
            self.placed[name] = (dtype, shape, self.end)
            self.end += torch.Size(shape).numel() * dtype.itemsize
        unknown: Described = dict.fromkeys(appended, (torch.uint8, (LONGEST,), LONGEST))
        self.waiting = {*known, *appended}
        self.header_bytes = len(header_text(self.placed | unknown, longest_metadata))
        self.header_bytes += -self.header_bytes % 8  # the data begins at a multiple of 8
        with writing(file):
            self.stream = file.open("wb", buffering=0)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; each must be written once."""
        self.waiting.remove(name)
        if name not in self.placed:
            self.placed[name] = (tensor.dtype, tuple(tensor.shape), self.end)
            self.end += tensor.nbytes
        dtype, shape, offset = self.placed[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        with writing(self.file):
            self.stream.seek(8 + self.header_bytes + offset)
            write_all(self.stream, tensor.contiguous())

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and return when the file would survive a power cut."""
        if self.waiting:
            raise ValueError(f"{len(self.waiting)} tensors were not written: {min(self.waiting)}")
        text = header_text(self.placed, metadata)
        if len(text) > self.header_bytes:
            raise ValueError(f"header of {len(text)} bytes where {self.header_bytes} are kept free")
        with writing(self.file):
            self.stream.seek(0)
            self.stream.write(self.header_bytes.to_bytes(8, "little"))
            self.stream.write(text.ljust(self.header_bytes))
            os.fsync(self.stream.fileno())


def write_index(file: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of several files: the file of each tensor."""
    tensors = dict(sorted(weight_map.items()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": tensors}
    file.write_text(json.dumps(index, indent=2), encoding="utf-8", newline="\n")


def write_shards(
    folder: Path, shards: Mapping[str, Specs], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write files of plain tensors, and their index where the file is not one that needs none.

    Args:
        folder: exists.
        shards: dtype and shape of the tensors of each file.
        tensors: each of them once, in the order of the files.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    remaining = iter(tensors)
    for file, known in shards.items():
        with ShardWriter(folder / file, known, [], PLAIN) as writer:
            for name, tensor in islice(remaining, len(known)):
                writer.write(name, tensor)
            writer.close(PLAIN)
    for name, _ in remaining:  # lets a generator end
        raise ValueError(f"{name} belongs to no file")
    if [*shards] != [SINGLE_NAME]:
        files = {name: file for file, known in shards.items() for name in known}
        write_index(folder / INDEX_NAME, files, sum(map(size_of, shards.values())))


def size_of(specs: Specs) -> int:
    """The bytes of tensors of these dtypes and shapes."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in specs.values())


def header_text(placed: Described, metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header, tensors in the order of their bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape, offset) in sorted(placed.items(), key=lambda x: x[1][2]):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        place = {"shape": list(shape), "data_offsets": [offset, end]}
        header[name] = {"dtype": dtype_name(dtype), **place}
    return json.dumps(header, separators=(",", ":")).encode()


def refuse_not_finite(files: Iterable[Path], ranks: Ranks = ALONE) -> None:
    """Refuse weights that are NaN or infinite. Each file is read once, in small blocks.

    The processes of a machine divide the blocks. A process reads a file once, as long as nobody
    changes it.

    Args:
        files: safetensors files.
        ranks: the processes that share the reading.

    Raises:
        NumericalError: naming the first tensor that has such values.
    """
    files = [file.absolute() for file in files]
    own = [file.name for file in files if _not_finite_in(file, ranks.place, ranks.here)]
    found = {name for names in ranks.gather(own) for name in names}
    for file in files:
        bad = _not_finite_in(file, 0, 1) if file.name in found else {}  # all of its blocks
        if bad:
            name, (odd, count) = next(iter(bad.items()))
            more = f"; so are values of {len(bad) - 1} more tensors" if len(bad) > 1 else ""
            raise NumericalError(
                f"{odd} of {count} weights are NaN or infinite{more}",
                where=f"{name} in {file}",
                remedy="the checkpoint is damaged: download or make it again; "
                "`secateur diagnose` lists all such tensors",
            )


def _not_finite_in(file: Path, place: int, here: int) -> Mapping[str, tuple[int, int]]:
    """How many values of a file are NaN or infinite, of how many, by tensor.

    Args:
        file: a safetensors file.
        place: number of the process on its machine, which reads every block of number
            `place` modulo `here`.
        here: number of processes on the machine.
    """
    found = file.stat()
    return _blocks_read(file, found.st_ino, found.st_size, found.st_mtime_ns, place, here)


@lru_cache(maxsize=1024)
def _blocks_read(
    file: Path, inode: int, size: int, changed: int, place: int, here: int
) -> Mapping[str, tuple[int, int]]:
    """Read the blocks of a process; `inode`, `size` and `changed` say which file it is."""
    entries = {n: e for n, e in read_header(file).items() if e.dtype.is_floating_point}
    every = [(n, i) for n, e in entries.items() for i in range(0, prod(e.shape), BLOCK_VALUES)]
    own = every[place::here]

    def read(block: tuple[str, int]) -> int:
        name, start = block
        entry = entries[name]
        values = torch.empty(min(prod(entry.shape) - start, BLOCK_VALUES), dtype=entry.dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + start * entry.dtype.itemsize)
            read_all(stream, values)
        return not_finite(values)

    bad = Counter[str]()
    with ThreadPoolExecutor(max(1, min(READERS, usable_processors() // here))) as readers:
        for (name, _), odd in zip(own, readers.map(read, own), strict=True):
            bad[name] += odd
    return {name: (odd, prod(entries[name].shape)) for name, odd in bad.items() if odd}


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    if tensor.dtype in NOT_FINITE:
        bits, lowest = NOT_FINITE[tensor.dtype]
        return int((tensor.view(torch.uint8).bitwise_and(bits) >= lowest).sum())
    # One sum is enough for good values; only a bad one is examined in detail.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(tensor)).sum())
