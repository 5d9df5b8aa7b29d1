"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import RecipeError
from secateur.models.output_place import check_writable

__all__ = ["check_place", "whole_folder"]


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which gets its name by one rename when the block ends well.

    What is written lies in `OUTPUT.partial`; on an error it is removed, and after a kill the next
    call removes it.

    Args:
        output: the folder to make.
        overwrite: replace the model that is there.

    Raises:
        RecipeError: the output is there, or is no model's folder, or a stopped run of pruning
            lies in the partial one.
    """
    check_place(output, overwrite)
    partial = output.with_name(output.name + ".partial")
    if (partial / "work").exists():  # `secateur prune` could go on with it
        raise RecipeError(
            "a pruning run to this folder was stopped half-way",
            where=str(partial),
            remedy="finish it with --resume, remove it, or choose another --output",
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    os.rename(partial, output)


def check_place(output: Path, overwrite: bool) -> None:
    """Refuse to write over something, unless it is a model and the user wants it replaced.

    Raises:
        RecipeError: the output is there, or cannot be written.
    """
    check_writable(output)
    if not output.exists():
        return
    if not overwrite:
        raise RecipeError(
            "the output folder exists",
            where=str(output),
            remedy="choose another --output, or replace it with --overwrite",
        )
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise RecipeError(
            "the output is there and is no folder of a model, so it is not replaced",
            where=str(output),
            remedy="choose another --output, or remove it yourself",
        )
