"""Writes files and folders completely or not at all, and swaps names in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

UNFINISHED = ".unfinished"
"""Suffix of a file or folder that does not have its final name yet."""

AT_FDCWD, NO_REPLACE, EXCHANGE = -100, 1, 2
"""Arguments of Linux's renameat2(2)."""


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file completely or not at all, also across a power cut."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write content as JSON, completely or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, completely or not at all."""
    unfinished = file.with_name(file.name + UNFINISHED)
    save_file(tensors, unfinished)
    unfinished.replace(file)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; one rename gives it its name when the block succeeds.

    Files of a killed call under the unfinished name are removed first.

    Args:
        folder: the folder to make, within the work folder of a run; it does not exist yet.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def take_name(made: Path, name: Path, spare: Path) -> None:
    """Give a folder its final name. A folder that has the name now moves to `made` or `spare`.

    Where the system can swap two names in one step (Linux), the name always belongs to a complete
    folder: first the old one, then the new one. Elsewhere the old one is called `spare` for a
    moment; after a kill in that moment, `RunFolder` restores it.

    Args:
        made: the new folder.
        name: the final name.
        spare: a free name in the folder of `made`.

    Raises:
        FileExistsError: the name was free a moment ago, but no longer is.
    """
    if not os.path.lexists(name):
        if not rename(made, name, NO_REPLACE):
            made.rename(name)
    elif not rename(made, name, EXCHANGE):
        name.rename(spare)
        made.rename(name)


def rename(old: Path, new: Path, flag: int) -> bool:
    """Call Linux's renameat2; returns False where the system or file system has no such call.

    Raises:
        OSError: the system refuses the rename.
    """
    call = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(new))
