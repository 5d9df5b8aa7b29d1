"""Lets one process at a time work on a folder, and reports which one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError

try:
    import fcntl
except ImportError:  # Windows has none: there, nothing prevents two runs at once
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""The errors of file systems without locks."""


def holder(verb: str) -> dict[str, Any]:
    """The description of this process as the holder of a folder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"verb": verb, "process": os.getpid(), "host": socket.gethostname(), "since": since}


def in_use(who: Mapping[str, Any] | None, folder: Path) -> RecipeError:
    """The error that another process works on a folder; names it if it is known."""
    name = "another process"
    if who is not None:
        name = (
            f"process {who['process']} on {who['host']} (secateur {who['verb']}, since "
            f"{who['since']})"
        )
    return RecipeError(
        f"{name} is working on this output",
        where=str(folder),
        remedy="wait until it ends, or choose another --output",
    )


class Lock:
    """A lock on the folder itself, which needs no lock file.

    The system releases it when the process ends, however it ends.

    Args:
        folder: is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor: int | None = None

    def take(self) -> bool:
        """Create and lock the folder; returns False if another process holds it."""
        while self.descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                break
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
    def is_taken(self) -> bool:
        """Whether another process holds the folder now."""
        if self.descriptor is not None or not self.folder.exists():
            return False
        taken = not self.take()
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
