"""Opens, verifies, reads and writes compressed checkpoints.

A compressed checkpoint is a folder of transformers that stores packed matrices as their parts. The
reader trusts nothing. Opening a folder checks names, dtypes, shapes and sizes, from the headers
alone. Reading a tensor checks checksums, masks and codes. Every returned tensor has passed.

Each file describes itself in the JSON under `secateur` in its metadata. The description gives the
layout of every packed matrix, how activations are rounded, the checksum of every stored tensor, and
the decoding of archived ones. A digest covers all of this with names, dtypes and shapes, so that a
changed header is detected like changed data.

The larger tensors of an archive are compressed further (`archive.py`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models import checkpoint
from secateur.models.checkpoint import (
    PACKED_INDEX_NAME,
    QUANT_METHOD,
    Header,
    TensorEntry,
    as_bytes,
    parse_json,
    read_header,
)
from secateur.quantization.activations import GROUP
from secateur.runtime.archive import SMALLEST_BYTES, Archived, from_archive, to_archive
from secateur.runtime.formats import Layout, PartSpec, check_specs, formats, part_suffixes


def quantization_config(archive: bool, layouts: Iterable[Layout]) -> dict[str, Any]:
    """The entry of `config.json` for a compressed checkpoint with these matrices."""
    own = {"quant_method": QUANT_METHOD, "version": VERSION, "archive": archive}
    return {**own, "activations": activations_for(layouts)}


def _read_quantization_config(folder: Path) -> Any:
    """The `quantization_config` of a folder; None if it has none."""
    file = folder / "config.json"
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the configuration cannot be read: {error}", where=str(file)
        ) from None
    return config.get("quantization_config") if isinstance(config, dict) else None


def is_packed(folder: Path) -> bool:
    """Whether a folder is marked as a compressed checkpoint of this library.

    Raises:
        CheckpointError: `config.json` is missing or not JSON.
    """
    record = _read_quantization_config(folder)
    return isinstance(record, dict) and record.get("quant_method") == QUANT_METHOD


def device_for(folder: Path, asked: str, chosen: torch.device) -> torch.device:
    """Where a checkpoint runs: a compressed one on the CPU, unless the user names a device."""
    return torch.device("cpu") if asked == "auto" and is_packed(folder) else chosen


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Add the place to errors that do not name it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error}", where=where) from None
    except CheckpointError as error:
        if error.where is not None:
            raise
        raise CheckpointError(error.what, where=where, remedy=error.remedy) from None


class PackedCheckpoint:
    """A compressed checkpoint, its headers checked, nothing read yet.

    Args:
        folder: written by `secateur compress`.

    Attributes:
        folder: the same.
        archive: whether larger tensors are compressed.
        activations: how activations are rounded that meet integers, `{"values": "int8", "group":
            256}`; None if no matrix is integers.
        files: its safetensors files.
        layouts: of the packed matrices, by name without a suffix.
        entries: every tensor as stored in its file.
        specs: every tensor as returned, decoded from the archive.
        order: packed matrices without a suffix and all other tensors, in the order of the files.

    Raises:
        CheckpointError: a file is damaged or missing, or contradicts itself or another.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder if isinstance(folder, Path) else Path(folder)
        record, config = _read_quantization_config(self.folder), self.folder / "config.json"
        if not isinstance(record, dict) or record.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                "this is not the configuration of a compressed checkpoint",
                where=str(config),
                remedy="make one with `secateur compress DIR --output OUT`",
            )
        with _at(str(config)):
            _check_version(record.get("version"))
            stated = _validated(_Stated, record)
            _check_activations(stated.activations)
        self.archive = stated.archive
        self.files = checkpoint.shard_files(self.folder)
        self.layouts: dict[str, Layout] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.specs: dict[str, PartSpec] = {}
        self._archived: dict[str, Archived] = {}
        self._checksums: dict[str, str] = {}
        self.order: list[str] = []
        for file in self.files:
            with _at(str(file)):
                self._open(file, stated)
        self.activations = activations_for(self.layouts.values())
        if self.activations != stated.activations:
            raise CheckpointError(
                f"activations are said to be rounded to {stated.activations}, but with these "
                f"matrices they are rounded to {self.activations}",
                where=str(self.folder),
            )
        index = self.folder / PACKED_INDEX_NAME
        with _at(str(index)):
            record = parse_json(index.read_bytes())["weight_map"]
        found = {name: entry.file.name for name, entry in self.entries.items()}
        if odd := {*record.items()} ^ {*found.items()}:
            raise CheckpointError(
                f"the index and the files disagree about {min(odd)[0]!r}",
                where=str(index),
                remedy="copy or download the index again",
            )

    def _open(self, file: Path, stated: _Stated) -> None:
        """Check one file and add its tensors."""
        header = read_header(file)
        description = _read_description(header)
        names = sorted(x.name for x in self.files)
        if description.files != names:
            raise CheckpointError(
                f"the checkpoint has the files {', '.join(description.files)[:200]}; "
                f"the folder has {', '.join(names)[:200]}",
                remedy="copy or download the missing files",
            )
        # Of two files that disagree one is from another checkpoint, whatever its checksums say.
        own = (description.archive, description.activations)
        if own != (stated.archive, stated.activations):
            raise CheckpointError("this file and config.json disagree on archive or activations")
        twice = self.entries.keys() & header.keys()
        if twice:
            raise CheckpointError(f"{min(twice)!r} is in two files")
        specs = {name: PartSpec(e.dtype, e.shape) for name, e in header.items()}
        specs |= {name: x.spec for name, x in description.archived.items()}
        for name, layout in description.layouts.items():
            with _at(f"{file}: {name}"):
                check_specs(_parts_among(specs, name), layout)
        self.layouts |= description.layouts
        self.entries |= header
        self.specs |= specs
        self._archived |= description.archived
        self._checksums |= description.checksums
        # the order of the headers, with each matrix once, where its first part is
        suffixes = part_suffixes()
        owners = {f"{matrix}.{s}": matrix for matrix in description.layouts for s in suffixes}
        self.order += dict.fromkeys(owners.get(name, name) for name in header)

    def parts_of(self, name: str) -> list[str]:
        """The suffixes of the parts of a packed matrix."""
        return list(_parts_among(self.specs, name))

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a packed matrix by suffix, verified: they can be unpacked safely.

        Raises:
            CheckpointError: damaged, or the parts disagree.
        """
        layout = self.layouts[name]
        parts = {suffix: self.read(f"{name}.{suffix}") for suffix in self.parts_of(name)}
        with _at(f"{self.entries[f'{name}.{next(iter(parts))}'].file}: {name}"):
            formats[layout.format].check(parts, layout)
        return parts

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own, decoded, its checksum verified.

        Parts of a packed matrix are not checked against each other; see `parts`.

        Raises:
            CheckpointError: damaged.
        """
        entry = self.entries[name]
        # Read, not mapped: a file that changes after its checksum was computed changes nothing.
        stored = torch.empty(entry.shape, dtype=entry.dtype)
        with _at(f"{entry.file}: {name}"):
            with entry.file.open("rb", buffering=0) as stream:
                stream.seek(entry.offset)
                checkpoint.read_all(stream, stored)
            found = checksum(as_bytes(stored))
            if found != self._checksums[name]:
                raise CheckpointError(
                    f"the checksum is {found}, it should be {self._checksums[name]}",
                    remedy="copy or download the file again",
                )
            if name not in self._archived:
                return stored
            values = from_archive(stored, self._archived[name])
            if bad := checkpoint.not_finite(values):
                raise CheckpointError(f"{bad} of {values.numel()} values are NaN or infinite")
            return values

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its full name, verified; the parts of a matrix follow each other.

        Raises:
            CheckpointError: damaged, or parts disagree.
        """
        for name in self.order:
            if name in self.layouts:
                for suffix, part in self.parts(name).items():
                    yield f"{name}.{suffix}", part
            else:
                yield name, self.read(name)


class _Stated(BaseModel):
    """What `config.json` says: whether this is an archive, and how activations are rounded."""

    version: int
    archive: StrictBool
    activations: dict[str, Any] | None


def _parts_among(specs: Mapping[str, PartSpec], name: str) -> dict[str, PartSpec]:
    """The tensors that are parts of a matrix, by suffix."""
    return {s: specs[f"{name}.{s}"] for s in part_suffixes() if f"{name}.{s}" in specs}


@dataclass(frozen=True)
class PlannedFile:
    """The planned content of one file of a compressed checkpoint.

    Attributes:
        name: of the file.
        tensors: every tensor by full name, as passed to `write_packed`.
        layouts: of the packed matrices.
    """

    name: str
    tensors: dict[str, PartSpec] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)


def write_packed(
    folder: Path,
    files: list[PlannedFile],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    archive: bool = False,
) -> None:
    """Write the safetensors files of a compressed checkpoint, and their index.

    Args:
        folder: exists; use a folder that nobody reads before it is complete (`runs.folder`).
        files: the planned content of each file.
        tensors: every planned tensor once, grouped by file.
        archive: compress larger tensors.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    names = sorted(file.name for file in files)
    rounded = activations_for(layout for file in files for layout in file.layouts.values())
    remaining = iter(tensors)
    for file in files:
        _write_file(folder / file.name, file, names, remaining, archive, rounded)
    weight_map = {name: file.name for file in files for name in file.tensors}
    size = sum((folder / file.name).stat().st_size for file in files)
    checkpoint.write_index(folder / PACKED_INDEX_NAME, weight_map, size)


def _write_file(
    path: Path,
    planned: PlannedFile,
    names: list[str],
    tensors: Iterator[tuple[str, Tensor]],
    archive: bool,
    activations: Mapping[str, Any] | None,
) -> None:
    """Write one file, from the next tensors."""
    squeezed = {
        name: Archived.of(spec, "zstd")
        for name, spec in planned.tensors.items()
        if archive and spec.nbytes > SMALLEST_BYTES
    }
    plain = {n: (x.dtype, x.shape) for n, x in planned.tensors.items() if n not in squeezed}
    description = _description_of(planned, names, activations, squeezed if archive else None)
    # The header stands before the data, and sizes of frames are known only after it. So room is
    # left for the longest header: with frames of 2^50 bytes, and checksums of eight digits.
    nothing = dict.fromkeys(squeezed, PartSpec(torch.uint8, (2**50,)))
    longest = _describe_file(description, planned.tensors | nothing)
    stored_specs = dict(planned.tensors)
    with checkpoint.ShardWriter(path, plain, list(squeezed), longest) as writer:
        # `tensors` goes on with the next file, so only as many are taken as this file has
        for _ in planned.tensors:
            name, tensor = next(tensors)
            stored = tensor.contiguous()
            if name in squeezed:
                width = planned.tensors[name].width
                stored, description.archived[name] = to_archive(stored, width)
            description.checksums[name] = checksum(as_bytes(stored))
            stored_specs[name] = PartSpec(stored.dtype, tuple(stored.shape))
            writer.write(name, stored)
        writer.close(_describe_file(description, stored_specs))


METADATA_KEY = "secateur"
VERSION = 5
"""The version of the format that is written, and the only one that is read."""
NO_CHECKSUM = "0" * 8
ACTIVATIONS = {"values": "int8", "group": GROUP}
"""How activations are rounded that meet integers: the only way that the kernels have."""
NEWER = "install a newer secateur"


class _Description(_Stated):
    """The content of one file of a compressed checkpoint.

    Attributes:
        archive: whether larger tensors are compressed.
        activations: how activations are rounded that meet integers; None without integers.
        files: the names of all files of the checkpoint, sorted.
        layouts: of the packed matrices in this file, by name without a suffix.
        checksums: CRC-32 of the stored bytes of each tensor, in hexadecimal digits.
        archived: the tensors that archived bytes decode to.
        digest: of all this; empty where it is not computed yet.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    files: list[str]
    layouts: dict[str, Layout]
    checksums: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{8}$")]]
    archived: dict[str, Archived]
    digest: str = ""


def activations_for(layouts: Iterable[Layout]) -> dict[str, Any] | None:
    """How activations are rounded in a model with these matrices; None if no matrix is integers."""
    return dict(ACTIVATIONS) if any(layout.integers for layout in layouts) else None


def _check_version(stated: Any) -> None:
    if type(stated) is not int or stated != VERSION:
        raise CheckpointError(
            f"the format has version {str(stated)[:40]}, but this release reads version {VERSION}",
            remedy=NEWER,
        )


def _check_activations(stated: Any) -> None:
    """Refuse a way to round activations that is not ours."""
    if stated is not None and stated != ACTIVATIONS:
        raise CheckpointError(
            f"activations are rounded to {str(stated)[:80]}; this release rounds them to "
            f"{ACTIVATIONS['values']} in groups of {ACTIVATIONS['group']}, or not at all",
            remedy=NEWER,
        )


def _description_of(
    planned: PlannedFile,
    files: Sequence[str],
    activations: Mapping[str, Any] | None,
    archived: dict[str, Archived] | None = None,
) -> _Description:
    """The description of a file that is not written yet; `archived` is None without an archive."""
    return _Description(
        archive=archived is not None,
        activations=activations,
        files=[*files],
        layouts=planned.layouts,
        checksums=dict.fromkeys(planned.tensors, NO_CHECKSUM),
        archived=archived or {},
    )


def checksum(stored: memoryview) -> str:
    """The CRC-32 of bytes, as zlib and PNG compute it, in hexadecimal digits."""
    return f"{zlib.crc32(stored):08x}"


def _describe_file(description: _Description, stored: Mapping[str, PartSpec]) -> dict[str, str]:
    """The metadata of a file."""
    record = {
        **dict(description),
        "layouts": {name: layout.to_json() for name, layout in description.layouts.items()},
        "archived": {name: x.to_json() for name, x in description.archived.items()},
    }
    record["digest"] = _digest(record, stored)
    return {"format": "pt", METADATA_KEY: json.dumps(record, separators=(",", ":"))}


LATE = 10**9
"""A place in a file that takes as many digits as any place in a file below 10 GB."""


def header_bytes(
    tensors: Mapping[str, PartSpec], layouts: Mapping[str, Layout], files: Sequence[str] = ()
) -> int:
    """Bytes of the header of a file below 10 GB, at most.

    Args:
        tensors: in the file.
        layouts: of the matrices in it.
        files: the names of all files.
    """
    description = _description_of(PlannedFile("", dict(tensors), dict(layouts)), files, ACTIVATIONS)
    placed = {name: (spec.dtype, spec.shape, LATE) for name, spec in tensors.items()}
    text = checkpoint.header_text(placed, _describe_file(description, tensors))
    return 8 + len(text) + 7  # its length before it, and filled up to a multiple of 8


def _digest(record: Mapping[str, Any], stored: Mapping[str, PartSpec]) -> str:
    """The CRC-32 of the description without its digest, and of names, dtypes and shapes."""
    tensors = {name: [checkpoint.dtype_name(x.dtype), list(x.shape)] for name, x in stored.items()}
    # sorted keys and no spaces: the digest must not depend on how JSON was written
    covered = {**record, "tensors": tensors}
    covered.pop("digest", None)
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return checksum(memoryview(text.encode()))


def _read_description(header: Header) -> _Description:
    """Read and check the description of a file."""
    if METADATA_KEY not in header.metadata:
        raise CheckpointError(
            "the file does not say how its matrices are stored",
            remedy="this is no compressed checkpoint; make one with `secateur compress`",
        )
    try:
        record = parse_json(header.metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"the description is not JSON: {error}") from None
    _check_version(record.get("version") if isinstance(record, dict) else None)
    # before the types are checked: of a damaged header they would name a field, not the damage
    stored = {name: PartSpec(e.dtype, e.shape) for name, e in header.items()}
    if record.get("digest") != _digest(record, stored):
        raise CheckpointError(
            "the description of the file does not match its digest",
            remedy="the header was changed or damaged: copy or download the file again",
        )
    description = _validated(_Description, record)
    _check_activations(description.activations)
    odd = description.checksums.keys() ^ stored.keys() | description.archived.keys() - stored.keys()
    if odd:
        raise CheckpointError(f"the description and the tensors disagree about {min(odd)!r}")
    if description.archived and not description.archive:
        raise CheckpointError("tensors are archived, but the file claims to be no archive")
    for name, archived in description.archived.items():
        archived.check(stored[name])
    return description


Model = TypeVar("Model", bound=BaseModel)


def _validated(kind: type[Model], record: Any) -> Model:
    """What a file says, in the right types.

    Raises:
        CheckpointError: names the first entry that is wrong.
    """
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where[:120]}: {first['msg'][:120]}") from None
