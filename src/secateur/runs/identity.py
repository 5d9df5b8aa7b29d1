"""What a result depends on, so that only the same run resumes.

An identity is JSON. A file in it has its name and its content: a stopped run has kept what it read,
so a file counts as the same if its name or its content is the same. For a finished run only the
content counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from secateur.errors import RecipeError
from secateur.progress import Progress, Silent

BLOCK_BYTES = 2**22
LONGEST = 120
"""The most characters of a value that an error shows."""


class StoredFile(NamedTuple):
    """A file or folder in an identity.

    Attributes:
        spelled: its name, as the user wrote it.
        sha256: of its content.
    """

    spelled: str
    sha256: str

    @classmethod
    def of(cls, value: Any) -> Any:
        """The file that an entry of an identity describes; any other entry stays as it is."""
        described = isinstance(value, Mapping) and value.keys() == {*cls._fields}
        return cls(**value) if described else value


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


def content_of(path: str) -> Any:
    """A file or folder as an identity holds it: by its content. Any other name stays a name.

    Args:
        path: as the user spelled it, for messages.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return path
    files = sorted(file for file in place.rglob("*") if file.is_file()) or [place]
    lines = [f"{file.relative_to(place)} {file_digests([file])[file.name]}" for file in files]
    return StoredFile(path, hashlib.sha256("\n".join(lines).encode()).hexdigest())._asdict()


def what_counts(value: Any) -> Any:
    """An identity without how its files are spelled."""
    value = StoredFile.of(value)
    if isinstance(value, StoredFile):
        return value.sha256
    if isinstance(value, Mapping):
        return {key: what_counts(x) for key, x in value.items()}
    return [*map(what_counts, value)] if isinstance(value, list | tuple) else value


def _leaves(value: Any, place: str = "") -> dict[str, Any]:
    """The values in an identity by their place."""
    value = StoredFile.of(value)
    inner: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple) and not isinstance(value, StoredFile):
        inner = enumerate(value, start=1)
    else:
        return {place: value}
    start = f"{place}: " if place else ""
    return {key: x for name, own in inner for key, x in _leaves(own, f"{start}{name}").items()}


def differences(before: Any, now: Any, *, finished: bool = False) -> list[str]:
    """The differences between two identities, a sentence for each; none for the same run.

    Args:
        before: an identity, or a part of it.
        now: the same part of the other one.
        finished: whether the run is finished.
    """
    one, other = _leaves(before), _leaves(now)
    found = []
    for place in sorted(one.keys() | other.keys()):
        then, here = one.get(place), other.get(place)
        name, named = (x.spelled if isinstance(x, StoredFile) else x for x in (then, here))
        content, held = (x.sha256 if isinstance(x, StoredFile) else x for x in (then, here))
        both = isinstance(then, StoredFile) and isinstance(here, StoredFile)
        if content == held or (name == named and not (finished and both)):
            continue
        line = f"{place}: {name!r} then, {named!r} now"
        if name == named:
            line = f"{place}: the content of {named} has changed"
        found.append(line if len(line) <= 2 * LONGEST else f"{place} has changed")
    return found


def refuse_another(before: Any, now: Any, where: Path, *, finished: bool = False) -> None:
    """Refuse to resume a different run.

    Args:
        before: the identity that the earlier run stored.
        now: the identity of the run that would resume it.
        where: the earlier run.
        finished: whether it is finished; otherwise it was stopped.

    Raises:
        RecipeError: the identities differ; lists the differences.
    """
    if found := differences(before, json.loads(json.dumps(now)), finished=finished):
        raise RecipeError(
            f"the {'finished' if finished else 'stopped'} run was a different one "
            f"({'; '.join(found)})",
            where=str(where),
            remedy="choose another --output, or replace the result with --overwrite"
            if finished
            else "repeat the options of the first call, or start anew with --restart",
        )
