"""The files of a folder that are published, and those that are left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur.errors import CheckpointError, RecipeError
from secateur.models.checkpoint import INDEX_NAMES, copied_files, shard_files
from secateur.models.configuration import check_folder
from secateur.runs.folder import NOTES, STATE

CARD = "README.md"
PRIVATE = ("windows.safetensors", STATE)
"""Notes that are not published: tokens of the calibration text, whose licence is not the model's,
and the record that only `--resume` reads."""
PARTIAL = ".partial"


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        folder: the folder.
        files: what is published, by its name in the repository; the card is among them.
        left_out: names of the other files.
    """

    folder: Path
    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes."""
        return {name: file.stat().st_size for name, file in self.files.items()}


def contents_of(folder: Path) -> Contents:
    """List the files of a finished model folder: model, tokenizer, licence, card and notes.

    Args:
        folder: a folder that secateur wrote.

    Raises:
        RecipeError: it is no folder, or a run still works in it.
        CheckpointError: it is incomplete, has no card, or a file is a link out of the folder.
    """
    if not folder.is_dir():
        raise RecipeError(
            "there is no such folder", where=str(folder), remedy="name a folder of a model"
        )
    for place in (folder.absolute(), folder.absolute().parent):
        if place.name.endswith(PARTIAL) or (place / STATE).is_file():
            raise RecipeError(
                "this is the work folder of a run that has not finished",
                where=str(place),
                remedy="finish the run with --resume, then name its output",
            )
    check_folder(folder)
    if not (folder / CARD).is_file():
        raise CheckpointError(
            "the folder has no card (README.md)",
            where=str(folder),
            remedy="`secateur import DIR --output OUT` writes one for a model of another tool",
        )
    notes = [file for file in sorted((folder / NOTES).rglob("*")) if file.is_file()]
    listed = [*copied_files(folder), *shard_files(folder), folder / CARD]
    listed += [folder / name for name in INDEX_NAMES if (folder / name).is_file()]
    listed += [file for file in notes if file.name not in PRIVATE]
    files = {file.relative_to(folder).as_posix(): file for file in sorted(set(listed))}
    for name, file in files.items():
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{name} is a link out of the folder, to {file.resolve()}",
                where=str(file),
                remedy="replace it by the file, if that may be published",
            )
    every = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = (file.relative_to(folder).as_posix() for file in every)
    return Contents(folder, files, tuple(name for name in names if name not in files))
