"""The cache: files that were fetched or converted once, each put in place in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import SourceError

PARTIAL = ".partial"
DAY_SECONDS = 24 * 60 * 60


def cache_folder() -> Path:
    """Where fetched and converted files are kept: `$SECATEUR_HOME`, or `~/.cache/secateur`.

    Raises:
        SourceError: the user has no home, as some containers have it.
    """
    named = os.environ.get("SECATEUR_HOME")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "secateur"
    except RuntimeError as error:
        raise SourceError(
            f"there is no folder for the cache: {error}",
            where=named,
            remedy="set SECATEUR_HOME to a folder that can be written",
        ) from None


@contextlib.contextmanager
def work_beside(target: Path) -> Iterator[Path]:
    """An empty folder of the cache, next to what is made in it: on the same file system."""
    folder = target.parent
    with writing_cache(folder):
        for left in folder.glob(f"*{PARTIAL}"):  # of runs that were killed more than a day ago
            # another process may finish and remove its own folder meanwhile
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > DAY_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=PARTIAL) as work:
            yield Path(work)


@contextlib.contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Make a folder of the cache, and name the variable that moves it where it cannot be written.

    Raises:
        SourceError: the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SourceError(
            f"the cache cannot be written: {error}",
            where=str(folder),
            remedy="free some space, or set SECATEUR_HOME to a folder that can be written",
        ) from error
