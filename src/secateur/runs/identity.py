"""The identity of a run: everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.progress import Progress, Silent

BLOCK_BYTES = 2**22
LONGEST = 120
"""The most characters of a value that an error shows."""


def file_digests(files: Iterable[Path], progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of files by name, because the inputs of a stopped run must not change.

    Args:
        files: to read.
        progress: receives the steps, each a block of 4 MiB.
    """
    files, progress = list(files), progress or Silent()
    blocks = sum(-(-file.stat().st_size // BLOCK_BYTES) for file in files)
    progress.start("SHA-256 of source", max(1, blocks))
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                progress.step(note=file.name)
        found[file.name] = digest.hexdigest()
    progress.finish()
    return found


def refuse_another(
    before: Mapping[str, Any], now: Mapping[str, Any], where: Path, *, finished: bool = False
) -> None:
    """Refuse to resume a different run.

    Args:
        before: the identity that the earlier run stored.
        now: the identity of the run that would resume it.
        where: the earlier run.
        finished: whether it is finished; otherwise it was stopped.

    Raises:
        RecipeError: the identities differ; lists the differences.
    """
    now = json.loads(json.dumps(now))
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not differing:
        return
    raise RecipeError(
        f"the {'finished' if finished else 'stopped'} run was a different one "
        f"({'; '.join(difference(key, before.get(key), now.get(key)) for key in differing)})",
        where=str(where),
        remedy="choose another --output, or replace the result with --overwrite"
        if finished
        else "repeat the options of the first call, or start anew with --restart",
    )


def difference(key: str, before: Any, now: Any) -> str:
    """The difference between one part of two identities."""
    if isinstance(before, list) and isinstance(now, list) and dict in map(type, before + now):
        before, now = ({str(n): x for n, x in enumerate(one, 1)} for one in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        parts = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        inner = (difference(k, before.get(k), now.get(k)) for k in parts)
        return f"{key}: {', '.join(inner)}"
    line = f"{key}: {before!r} then, {now!r} now"
    return line if len(line) <= 2 * LONGEST else f"{key} has changed"
