"""What lies in a folder, for comparing it with another one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NOT_COMPARED = {".png", ".svg", ".md", ".csv", ".jsonl"}
VOLATILE = {"seconds", "peak_resident_bytes", "environment"}


def digest_of(file: Path) -> str:
    """Of the bytes of a file; of what was measured, without the time it took."""
    if file.name != "sweep.json":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        return json.dumps(without_times(json.loads(file.read_bytes())), sort_keys=True)
    except ValueError:
        return "no JSON"


def without_times(value: Any) -> Any:
    """A value without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_times(x) for k, x in value.items() if k not in VOLATILE}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """What a model's folder holds: digests of weights and what belongs to them, names of notes.

    Of a model that is one file, its digest.
    """
    if folder.is_file():
        return {"": digest_of(folder)}
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            continue
        name = file.relative_to(folder)
        noted = "secateur" in name.parts and file.suffix != ".safetensors"
        free = noted or file.suffix in NOT_COMPARED
        found[str(name)] = "" if free else digest_of(file)
    return found


def every_byte(folder: Path) -> dict[str, str]:
    """All that lies in a folder: digests of files, targets of links, and the folders themselves."""
    if folder.is_file():
        return contents(folder)
    found = {}
    for entry in sorted(folder.rglob("*")):
        name = str(entry.relative_to(folder))
        if entry.is_symlink():
            found[name] = f"link to {os.readlink(entry)}"
        elif entry.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    return found
