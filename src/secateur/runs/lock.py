"""A lock keeps two runs from one folder."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def _module(name: str) -> Any:
    """A module that not every system has; None where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")
"""POSIX and Windows lock by one of them."""

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""The errors of file systems without locks."""


class Lock:
    """A lock on the folder itself, which needs no lock file; on Windows on a file beside it.

    The system releases it when the process ends, however it ends. A killed process leaves the file
    beside the folder, and the next one uses it.

    Args:
        folder: is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor: int | None = None

    def take(self, *, create: bool = True) -> bool:
        """Lock the folder; returns False if another process holds it.

        Args:
            create: make the folder if there is none; otherwise nobody holds it.
        """
        while self.descriptor is None:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True)
            elif not self.folder.exists():
                break
            if fcntl is None:
                return self.take_file()
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(self.folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return False
                except OSError as error:
                    if error.errno not in WITHOUT_LOCKS:
                        raise
                    log.warning("%s is on a file system without locks: %s", self.folder, error)
                if self.is_folder(descriptor):
                    self.descriptor = descriptor
                else:  # the last holder has just removed it
                    os.close(descriptor)
        return True

    @property
    def file(self) -> Path:
        """The file that is locked where folders cannot be."""
        return self.folder.with_name(self.folder.name + ".lock")

    def take_file(self) -> bool:
        """Lock the file beside the folder; returns False if another process holds it."""
        if msvcrt is None:
            log.warning("%s is on a system without locks", self.folder)
            return True
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    @property
    def is_taken(self) -> bool:
        """Whether another process holds the folder now."""
        if self.descriptor is not None:
            return False
        taken = not self.take(create=False)
        self.release()
        return taken

    def is_folder(self, descriptor: int) -> bool:
        """Whether an open folder is still the one of this name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.folder))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            if fcntl is None:
                with contextlib.suppress(OSError):  # another process has just opened it
                    self.file.unlink()
