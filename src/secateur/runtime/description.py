"""The description of a compressed file: the JSON under `secateur` in its metadata.

It gives the layout of every packed matrix, how activations are rounded, the checksum of every
stored tensor, and the decoding of archived ones. A digest covers all of this with names, dtypes and
shapes, so that a changed header is detected like changed data.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import CheckpointError
from secateur.models.checkpoint import dtype_name
from secateur.models.header import Header, parse_json
from secateur.quantization.activations import GROUP
from secateur.runtime.archive import Archived, archived_spec
from secateur.runtime.formats import Layout, PartSpec

METADATA_KEY = "secateur"
VERSION = 4
"""The version that is written. Version 3 does not say how activations are rounded, version 2 has no
groups, and version 1 also has other file names."""
READABLE = (1, 2, 3, 4)
FIRST_WITH_GROUPS, FIRST_WITH_ACTIVATIONS = 3, 4
KEYS = {"version", "archive", "activations", "files", "layouts", "checksums", "archived", "digest"}
ACTIVATIONS = {"values": "int8", "group": GROUP}
"""How activations are rounded that meet integers: the only way that the kernels have."""
NEWER = "install a newer secateur"


@dataclass(frozen=True)
class Description:
    """The content of one file of a compressed checkpoint.

    Attributes:
        archive: whether larger tensors are compressed.
        files: the names of all files of the checkpoint, sorted.
        layouts: of the packed matrices in this file, by name without a suffix.
        checksums: CRC-32 of the stored bytes of each tensor.
        archived: the tensors that archived bytes decode to.
        activations: how activations are rounded that meet integers; None without integers.
        version: of the format.
    """

    archive: bool
    files: tuple[str, ...]
    layouts: Mapping[str, Layout]
    checksums: Mapping[str, int]
    archived: Mapping[str, Archived]
    activations: Mapping[str, Any] | None = None
    version: int = VERSION


def activations_for(layouts: Iterable[Layout]) -> dict[str, Any] | None:
    """How activations are rounded in a model with these matrices; None if no matrix is integers."""
    return dict(ACTIVATIONS) if any(layout.integers for layout in layouts) else None


def check_activations(stated: Any) -> None:
    """Refuse a way to round activations that is not ours.

    Raises:
        CheckpointError: names it.
    """
    if stated is not None and stated != ACTIVATIONS:
        raise CheckpointError(
            f"activations are rounded to {str(stated)[:80]}; this release rounds them to "
            f"{ACTIVATIONS['values']} in groups of {ACTIVATIONS['group']}, or not at all",
            remedy=NEWER,
        )


def checksum(stored: memoryview) -> int:
    """The CRC-32 of bytes, as zlib and PNG compute it."""
    return zlib.crc32(stored)


def describe_file(description: Description, stored: Mapping[str, PartSpec]) -> dict[str, str]:
    """The metadata of a file.

    Args:
        description: of the content.
        stored: dtype and shape of its tensors, as they are stored.
    """
    record: dict[str, Any] = {
        "version": description.version,
        "archive": description.archive,
        "activations": description.activations,
        "files": list(description.files),
        "layouts": {name: layout.to_json() for name, layout in description.layouts.items()},
        "checksums": {name: f"{value:08x}" for name, value in description.checksums.items()},
        "archived": {name: x.to_json() for name, x in description.archived.items()},
    }
    record["digest"] = digest(record, stored)
    return {"format": "pt", METADATA_KEY: json.dumps(record, separators=(",", ":"))}


def digest(record: Mapping[str, Any], stored: Mapping[str, PartSpec]) -> str:
    """The CRC-32 of the description without its digest, and of names, dtypes and shapes."""
    tensors = {name: [dtype_name(x.dtype), list(x.shape)] for name, x in stored.items()}
    covered = {key: value for key, value in record.items() if key != "digest"} | {
        "tensors": tensors
    }
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return f"{checksum(memoryview(text.encode())):08x}"


def read_description(header: Header) -> Description:
    """Read and check the description of a file.

    Raises:
        CheckpointError: there is none, it has another version, is damaged, or describes other
            tensors than those of the file.
    """
    record = parse_description(header)
    stored = {name: PartSpec(e.dtype, e.shape) for name, e in header.entries.items()}
    if record["digest"] != digest(record, stored):
        raise CheckpointError(
            "the description of the file does not match its digest",
            remedy="the header was changed or damaged: copy or download the file again",
        )
    check_kinds(record)
    check_names("checksums", record["checksums"], stored, all_of_them=True)
    check_names("archived tensors", record["archived"], stored, all_of_them=False)
    if record["archived"] and not record["archive"]:
        raise CheckpointError("tensors are archived, but the file claims to be no archive")
    layouts = {name: Layout.from_json(layout) for name, layout in record["layouts"].items()}
    grouped = [name for name, layout in layouts.items() if layout.group is not None]
    if grouped and record["version"] < FIRST_WITH_GROUPS:
        raise CheckpointError(
            f"{min(grouped)!r} has groups, and version {record['version']} of the format has none"
        )
    return Description(
        record["archive"],
        tuple(record["files"]),
        layouts,
        {name: read_checksum(name, text) for name, text in record["checksums"].items()},
        {name: archived_spec(x, stored[name]) for name, x in record["archived"].items()},
        record.get("activations"),
        record["version"],
    )


def parse_description(header: Header) -> dict[str, Any]:
    """The JSON of the description, if this release reads its version.

    Raises:
        CheckpointError: there is none, or it has another version.
    """
    if METADATA_KEY not in header.metadata:
        raise CheckpointError(
            "the file does not say how its matrices are stored",
            remedy="this is no compressed checkpoint; make one with `secateur compress`",
        )
    try:
        record = parse_json(header.metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"the description is not JSON: {error}") from None
    if not isinstance(record, dict) or type(record.get("version")) is not int:
        raise CheckpointError("the description has no version")
    if record["version"] not in READABLE:
        raise CheckpointError(
            f"the file has version {record['version']}, but this release reads 1 to {VERSION}",
            remedy=NEWER,
        )
    keys = KEYS if record["version"] >= FIRST_WITH_ACTIVATIONS else KEYS - {"activations"}
    if set(record) != keys:
        raise CheckpointError(
            f"the description lacks or adds keys: {', '.join(sorted(set(record) ^ keys))[:200]}"
        )
    return record


def check_kinds(record: Mapping[str, Any]) -> None:
    """Refuse values of the wrong kind.

    Raises:
        CheckpointError: names the key.
    """
    if type(record["archive"]) is not bool:
        raise CheckpointError("archive is not true or false")
    check_activations(record.get("activations"))
    files = record["files"]
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise CheckpointError("files is not a list of names")
    for key in ("layouts", "checksums", "archived"):
        if not isinstance(record[key], dict):
            raise CheckpointError(f"{key} is not a JSON object")


def check_names(
    kind: str, named: Mapping[str, Any], stored: Mapping[str, PartSpec], *, all_of_them: bool
) -> None:
    """Refuse names of tensors that are not in the file, and optionally missing names.

    Raises:
        CheckpointError: names one of them.
    """
    odd = (set(named) ^ set(stored)) if all_of_them else set(named) - set(stored)
    if odd:
        raise CheckpointError(f"{kind} and tensors disagree about {min(odd)!r}")


def read_checksum(name: str, text: Any) -> int:
    """A checksum of eight hexadecimal digits.

    Raises:
        CheckpointError: this is no checksum.
    """
    try:
        if isinstance(text, str) and len(text) == 8 and text == f"{int(text, 16):08x}":
            return int(text, 16)
    except ValueError:
        pass
    raise CheckpointError(f"the checksum of {name!r} is not 8 hexadecimal digits")
