"""Where a run writes: the output folder, and the partial one that becomes it by one rename."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import RecipeError
from secateur.models.whole_folder import check_place

__all__ = ["places"]


def places(
    output: str | Path | None,
    mark: str,
    what: str = "run",
    *,
    resume: bool,
    restart: bool,
    overwrite: bool,
) -> tuple[Path, Path]:
    """The output folder and the partial one, checked before any work.

    Args:
        output: as the user gave it.
        mark: what lies in the partial folder of a run that can be gone on with.
        what: it is called.
        resume: go on with a stopped run.
        restart: discard what it left.
        overwrite: replace the model that is there.

    Raises:
        RecipeError: output missing or taken, a stopped run lies there, or there is none to resume.
    """
    if output is None:
        raise RecipeError("no output folder", remedy="add --output DIR")
    folder = Path(output)
    check_place(folder, overwrite)
    partial = folder.with_name(folder.name + ".partial")
    begun = (partial / mark).exists()
    if resume and not begun:
        raise RecipeError(
            f"there is no stopped {what} to resume",
            where=str(partial),
            remedy="run without --resume",
        )
    if begun and not resume and not restart:
        raise RecipeError(
            f"a {what} to this folder was stopped half-way",
            where=str(partial),
            remedy="add --resume to go on with it, or --restart to discard it",
        )
    return folder, partial
