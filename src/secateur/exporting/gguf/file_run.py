"""The life of a run whose result is a GGUF file, or several that are parts of one model.

    OUTPUT.partial/   as in a run that writes a folder; the files grow in OUTPUT.partial/model
    OUTPUT            a key of its metadata is a digest of the run, so that --resume knows it

Every file gets its name by one rename, the first part last: no reader finds it before the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, RecipeError
from secateur.models.gguf_file import MAGIC, read_part
from secateur.runs.folder import RunFolder, State
from secateur.runs.output import NO_REPLACE, rename

RUN = "secateur.run"
"""The key of the metadata that has the digest of the run."""


class FileRun(RunFolder):
    """The run of a GGUF file.

    Args:
        names: of the files of the result, in the folder of the output; the first part first.
        output: the file that the user names.
        verb: the name of the command on the command line.
        call: `resume`, `restart` and `overwrite`.
    """

    def __init__(self, names: Sequence[str], output: Path, verb: str, **call: bool) -> None:
        self.names = names
        super().__init__(output.with_name(names[0]), verb, **call)

    @property
    def files(self) -> list[Path]:
        """The files of the result, under their final names."""
        return [self.output.with_name(name) for name in self.names]

    @property
    def is_written(self) -> bool:
        """Whether a stopped run has written everything, and only names are missing."""
        return self.state is not None and self.state.finished is not None

    def check_free_name(self, stopped: State | None = None, result: Path | None = None) -> None:
        """Refuse files that exist, unless they are GGUF files and may be replaced."""
        if stopped is not None and stopped.finished is not None:
            return  # some may have their names already
        for file in filter(os.path.lexists, self.files):
            kept = f"; the finished result is in {result}" if result else ""
            if not self.overwrite:
                raise RecipeError(
                    f"the output exists{kept}",
                    where=str(file),
                    remedy="choose another --output, or replace it with --overwrite",
                )
            if not is_gguf(file):
                raise RecipeError(
                    f"the output exists and is no GGUF file, so it is not replaced{kept}",
                    where=str(file),
                    remedy="choose another --output, or remove it yourself",
                )

    def result(self, begun: State | None) -> State | None:
        """The run that made the output, by the digest in its metadata."""
        named = self.has_name(begun)
        if named or begun is not None or self.overwrite or not self.output.is_file():
            return begun if named else None
        try:
            stored = read_part(self.output).fields[RUN].value
        except (CheckpointError, KeyError):
            return None
        found = self.output.stat()
        return State(self.verb, {RUN: stored}, finished=(found.st_dev, found.st_ino))

    def begin(self, identity: Mapping[str, Any], settled: Mapping[str, Any] | None = None) -> None:
        """Store what the result depends on. A finished result is known by its digest."""
        known = self.state.identity if self.state is not None else None
        if known is not None and RUN in known and known[RUN] != digest_of(identity):
            raise RecipeError(
                "the finished run was a different one",
                where=str(self.output),
                remedy="choose another --output, or replace the result with --overwrite",
            )
        if known is None or RUN not in known:
            super().begin(identity, settled)

    def finish(self) -> None:
        """Give the files their names, the first part last.

        Raises:
            RecipeError: an output has appeared during the run; the result stays where it is.
        """
        assert self.state is not None
        self.whole = True
        self.check_free_name(self.state, result=self.model)
        if not self.is_written:
            self.note_finished(self.model / self.names[0])
        for file in reversed(self.files):
            made = self.model / file.name
            try:
                if made.exists() and (self.overwrite or not rename(made, file, NO_REPLACE)):
                    made.replace(file)
            except FileExistsError:
                self.check_free_name(result=self.model)
                raise
        self.finished = True


def is_gguf(file: Path) -> bool:
    """Whether something of this name begins as a GGUF file does."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity, whatever its files are called."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get("sha256") or {key: bare(inner) for key, inner in value.items()}
        return [bare(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(bare(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
