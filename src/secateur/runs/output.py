"""Checks an output: may it be written, may it replace something, is there disk space.

Files and folders are written completely or not at all, and names are swapped in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from secateur.errors import MemoryBudgetError, RecipeError, SecateurError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

LONGEST_ENDING = ".partial"
"""The suffix of the output's name while a run works."""

REFUSALS = {
    errno.ENAMETOOLONG: ("the name of the output is too long", "choose a shorter name"),
    errno.ENOTDIR: ("the output would be inside a file", "choose another --output"),
    errno.EISDIR: ("the output is a folder, not a file", "name a file"),
    errno.EFBIG: (
        "a file would be too large",
        "raise the limit (ulimit -f), or choose another disk",
    ),
    errno.ELOOP: ("the path of the output has a loop of symbolic links", "choose another one"),
}
"""The fault of an output by the system's error number, and the remedy."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every error of the system on writing a file or folder into one that says the remedy."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error, path) from error


def check_writable(output: Path, *, file: bool = False) -> None:
    """Refuse an output that cannot be written; leaves no file behind.

    A trial decides, not a computation of permissions: only the system knows quotas, read-only file
    systems and the rights of root.

    Args:
        output: the folder or file to write, with its parent folders.
        file: whether it is a file, which may exist.

    Raises:
        RecipeError: the output is a symbolic link, its name is too long, or its folder cannot be
            written.
        MemoryBudgetError: the disk is full.
    """
    if output.absolute() == output.absolute().parent:
        raise RecipeError(
            "the output is the root of all folders", where=str(output), remedy="name a folder in it"
        )
    try:
        if output.is_symlink() and not file:
            raise RecipeError(
                f"the output is a symbolic link to {os.readlink(output)}",
                where=str(output),
                remedy="name a folder that is no link, or remove the link",
            )
        with contextlib.suppress(FileNotFoundError):
            os.lstat(output if file else output.with_name(output.name + LONGEST_ENDING))
        if file and output.exists():
            with output.open("ab"):
                return
        folder = output.absolute().parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):  # on Linux it has no name, so a kill leaves none
            pass
    except ValueError as error:  # no file can have this name
        raise RecipeError(
            f"the output cannot be written: {error}", where=repr(output), remedy="choose another"
        ) from None
    except OSError as error:
        raise cannot_write(error, output) from None


OURS = ("config.json", "sweep.json")
"""A folder with one of these may be replaced: it is a model, or a sweep."""


def is_gguf(file: Path) -> bool:
    """Whether something of this name begins as a GGUF file does."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def is_ours(folder: Path) -> bool:
    """Whether it is the folder of a model or a sweep, has only a GGUF file, or is empty."""
    if not folder.is_dir():
        return False
    of_run = ("README.md", "secateur") if (folder / "secateur" / "run.json").is_file() else ()
    others = [entry for entry in folder.iterdir() if entry.name not in of_run]
    alone = len(others) <= 1 and all(map(is_gguf, others))
    return alone or any((folder / name).exists() for name in OURS)


def check_replaceable(
    output: Path, overwrite: bool, result: Path | None = None, *, file: bool = False
) -> None:
    """Refuse to overwrite anything, unless it is a model and the user allows it.

    Args:
        output: the folder or file to write.
        overwrite: whether an existing model may be replaced.
        result: the folder of the finished result, if the work is done.
        file: whether it is a GGUF file.

    Raises:
        RecipeError: the output exists.
    """
    if not os.path.lexists(output):
        return
    kept = f"; the finished result is in {result}" if result else ""
    again = " and run again, with --resume where the command has it" if result else ""
    if not overwrite:
        what = "the output" if file else "the output folder"
        raise RecipeError(
            f"{what} {'has appeared during the run' if result else 'exists'}{kept}",
            where=str(output),
            remedy=f"move it away{again}; or rename the result yourself"
            if result
            else "choose another --output, or replace it with --overwrite",
        )
    if not (is_gguf if file else is_ours)(output):
        kind = "GGUF file" if file else "model folder"
        raise RecipeError(
            f"the output exists and is no {kind}, so it is not replaced{kept}",
            where=str(output),
            remedy=f"choose another --output, or remove it yourself{again}",
        )


def check_apart(read: str | Path, output: Path, partial: Path) -> None:
    """Refuse an output that would replace files that a run reads, or is inside a model's folder.

    Args:
        read: a file or folder that the run reads; a name that is no path is ignored.
        output: the folder to write.
        partial: the work folder of the run.

    Raises:
        RecipeError: output or work folder is inside `read`, contains it, or is the same.
    """
    try:
        if not os.path.lexists(read):
            return
    except (OSError, ValueError):  # a hub id or a text that no file could be called
        return
    source = Path(os.path.realpath(read))
    for place in (Path(os.path.realpath(output)), Path(os.path.realpath(partial))):
        if source == place:
            what = "the output is the source itself"
        elif source.is_relative_to(place):
            what = "the source is inside the output, which would replace it"
        elif (source / "config.json").exists() and place.is_relative_to(source):
            what = "the output is inside the source"
        else:
            continue
        raise RecipeError(
            what,
            where=f"source {source}, output {place}",
            remedy="choose an --output outside the source",
        )


def check_free(needed_bytes: int, folder: Path, own: Path | None = None) -> None:
    """Refuse a run that does not fit on the disk.

    Args:
        needed_bytes: the bytes to write.
        folder: the destination; it need not exist yet.
        own: files of a stopped run, which will be overwritten and count as free.

    Raises:
        MemoryBudgetError: names both sizes.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if own is not None:
        free += sum(file.stat().st_size for file in own.rglob("*") if file.is_file())
    if needed_bytes > free:
        raise MemoryBudgetError(
            f"the run needs {size(needed_bytes)} of disk, but {size(free)} are free",
            where=str(place),
            remedy="free some space, or choose another --output",
        )


def size(count: int) -> str:
    """Bytes in a readable unit."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def is_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space; safetensors and numpy say so in a message only."""
    if isinstance(error, MemoryBudgetError) and error.__cause__ is not None:
        return is_full(error.__cause__)
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, DISK_FULL))
    if isinstance(error, OSError) and error.errno is None:
        return re.fullmatch(r"\d+ requested and \d+ written", str(error)) is not None
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_write(error: BaseException, where: Path, *, kept: bool = False) -> SecateurError:
    """The error for the user after a failed write.

    Args:
        error: of the write.
        where: what was written.
        kept: whether --resume continues the run.
    """
    if is_full(error):
        place = where
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        return MemoryBudgetError(
            f"the disk is full ({free / 2**20:.0f} MiB free)",
            where=str(where),
            remedy=f"free some space and run again{' with --resume' if kept else ''}, or choose "
            "another --output",
        )
    what, remedy = REFUSALS.get(
        getattr(error, "errno", None) or 0,
        (
            f"the output cannot be written: {getattr(error, 'strerror', None) or error}",
            "choose a folder that you may write to, or change its permissions",
        ),
    )
    return RecipeError(what, where=str(where), remedy=remedy)


DISK_FULL = 112
"""Windows' number for it."""

UNFINISHED = ".unfinished"
"""Suffix of a file or folder that does not have its final name yet."""

NO_REPLACE, EXCHANGE = "no replace", "exchange"
AT_FDCWD, LINUX_FLAGS = -100, {NO_REPLACE: 1, EXCHANGE: 2}
"""Arguments of Linux's renameat2(2)."""
MACOS_FLAGS = {NO_REPLACE: 4, EXCHANGE: 2}
"""Arguments of macOS's renamex_np(2)."""


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file completely or not at all, also across a power cut."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)  # the name never belongs to a part of the file


def write_text(file: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write content as JSON, completely or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """A measured value, from its file or else measured, as JSON has it."""
    if not file.exists():
        write_json(file, measure())
    return json.loads(file.read_text(encoding="utf-8"))


def write_record(file: Path, content: Any) -> None:
    """Write a result as JSON into the notes of a model that was only read.

    Such a model may lie on a read-only disk: its result is shown all the same, with a warning.
    """
    try:
        write_json(file, content)
    except OSError as error:
        log.warning("the result was not stored in %s: %s", file, error.strerror or error)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, completely or not at all."""
    from safetensors.torch import save_file  # needs torch, and other files do not

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

    Where the system can swap two names in one step (Linux, macOS), the name always belongs to a
    complete folder: first the old one, then the new one. Elsewhere the old one is called `spare`
    for a moment; after a kill in that moment, `RunFolder` restores it.

    Args:
        made: the new folder.
        name: the final name.
        spare: a free name in the folder of `made`.

    Raises:
        FileExistsError: the name was free a moment ago, but no longer is.
    """
    if not os.path.lexists(name):
        if not rename(made, name, NO_REPLACE):
            _rename_to_free(made, name)
    elif not rename(made, name, EXCHANGE):
        name.rename(spare)
        made.rename(name)


def _rename_to_free(made: Path, name: Path) -> None:
    """Rename where the system has no call that refuses a taken name.

    Windows refuses by itself, other systems all but an empty folder.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        made.rename(name)
    except OSError as error:
        if os.path.lexists(name) and made.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name)) from error
        raise


def rename(old: Path, new: Path, how: str) -> bool:
    """Rename by a call of Linux or macOS; returns False where there is no such call.

    Raises:
        OSError: the system refuses the rename.
    """
    try:
        libc: Any = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows has no library without a name
        return False
    names = os.fsencode(old), os.fsencode(new)
    if hasattr(libc, "renameat2"):
        code = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], LINUX_FLAGS[how])
    elif hasattr(libc, "renamex_np"):
        code = libc.renamex_np(*names, MACOS_FLAGS[how])
    else:
        return False
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the file system has no such call
        return False
    raise OSError(number, os.strerror(number), str(new))
