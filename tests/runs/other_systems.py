"""Linux without the calls that other systems do not have, and with the refusals of Windows."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from secateur.runs import environment
from secateur.runs import lock as run_lock

SYSTEMS = ("macos", "windows")
CDLL = ctypes.CDLL
PLAIN = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
MOVED_FLAGS = {4: 1, 2: 2}
"""Flags of renameat2 by those of renamex_np."""


class Macos:
    """The library of the system: no function of glibc, and another name for renaming."""

    def renamex_np(self, old: bytes, new: bytes, flag: int) -> int:
        code: int = CDLL(None, use_errno=True).renameat2(-100, old, -100, new, MOVED_FLAGS[flag])
        return code


class WindowsLocks:
    """The module `msvcrt`: an open file is locked, until it is closed."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (WindowsLocks.LK_NBLCK, 1)
        assert not os.path.isdir(f"/proc/self/fd/{descriptor}")  # Windows opens files only
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


def library(system: str) -> Callable[..., Any]:
    """`ctypes.CDLL` of a system."""

    def of(file: str | None, *args: Any, **options: Any) -> Any:
        if file is not None:
            return CDLL(file, *args, **options)
        if system == "windows":
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return Macos()

    return of


def in_use() -> set[str]:
    """The files that this process has open or mapped."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found = {line.rstrip("\n").partition("/")[2] for line in maps}
    used = {f"/{name}" for name in found if name}
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.path.isdir(link := f"/proc/self/fd/{number}"):
                used.add(os.readlink(link))
        except FileNotFoundError:
            continue
    return used


def refuse_used(place: Any) -> None:
    """As Windows refuses to move or delete what is open, and a folder in which something is."""
    if isinstance(place, (str, os.PathLike)) and Path("/proc/self/maps").exists():
        name = os.path.realpath(place)
        used = [file for file in in_use() if file == name or file.startswith(f"{name}/")]
        if used:
            raise PermissionError(errno.EACCES, "used by a process", used[0])


def strict(name: str) -> Callable[..., Any]:
    """A function of `os` with the refusals of Windows."""

    def call(first: Any, *more: Any, **options: Any) -> Any:
        if options.get("dir_fd") is None:
            refuse_used(first)
            if name == "replace":
                refuse_used(more[0])
            if name == "rename" and os.path.lexists(more[0]):
                raise FileExistsError(errno.EEXIST, "File exists", str(more[0]))
        return PLAIN[name](first, *more, **options)

    return call


RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in "123456789"
}


def refuse_name(place: Any) -> None:
    """As Windows refuses some characters and some names."""
    if isinstance(place, (str, os.PathLike)):
        name = os.path.basename(os.fspath(place))
        if set(name) & set('<>:"|?*') or name.partition(".")[0].lower() in RESERVED:
            raise OSError(errno.EINVAL, "The filename is incorrect", name)


def opener(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes or opens a file or a folder, if it can have the name."""

    def call(place: Any, *more: Any, **options: Any) -> Any:
        refuse_name(place)
        return plain(place, *more, **options)

    return call


def pretend(system: str, patch: pytest.MonkeyPatch) -> None:
    """Take away what a system does not have, as far as it is used."""
    patch.setattr(ctypes, "CDLL", library(system))
    for name in ("sched_getaffinity", "sched_setaffinity", "posix_fallocate"):
        patch.delattr(os, name, raising=False)
    for name in ("CPUINFO", "STATUS", "CLEAR_REFS"):
        patch.setattr(environment, name, Path("/no/such/folder/file"))
    if system == "macos":
        return
    for name in ("SIGHUP", "SIGUSR1"):
        patch.delattr(signal, name, raising=False)
    for name in ("fork", "getuid", "geteuid"):
        patch.delattr(os, name, raising=False)
    patch.setitem(sys.modules, "resource", None)
    patch.setattr(run_lock, "fcntl", None)
    patch.setattr(run_lock, "msvcrt", WindowsLocks)
    patch.setattr(psutil.Process, "memory_info", lambda self: MEMORY)
    patch.setattr(Path, "symlink_to", refused)
    for name in PLAIN:
        patch.setattr(os, name, strict(name))
    patch.setattr(os, "mkdir", opener(os.mkdir))
    patch.setattr(io, "open", opener(io.open))
    patch.setattr("builtins.open", opener(open))
    if sys.version_info < (3, 11):  # it keeps the functions of `os`
        for name in PLAIN:
            patch.setattr(Path._accessor, name, strict(name))  # type: ignore[attr-defined]


MEMORY = SimpleNamespace(rss=2**28, peak_wset=2**29)


def refused(self: Path, target: Any) -> None:
    """As Windows refuses links to most users."""
    raise OSError(errno.EPERM, "A required privilege is not held by the client")
