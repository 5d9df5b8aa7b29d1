"""Exports a model for another engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, VerificationError
from secateur.exporting import ExportSource, targets
from secateur.models.configuration import read_config
from secateur.models.sources import resolve
from secateur.progress import Progress, listener
from secateur.recipes.exchange import ExportRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.registry import did_you_mean
from secateur.reporting.results.export import ExportResult
from secateur.runs.folder import RunFolder
from secateur.runtime.install import open_checkpoint


@takes_options_of(ExportRecipe)
def export(model: str | Path, *, progress: Progress | None = None, **options: Any) -> ExportResult:
    """Write a model for another engine, with its zeros.

    The model is checked first: one that the engine would compute differently is refused. The zeros
    of every matrix are counted before and after. A type that keeps exact zeros must keep all of
    them; the result says how many another type lost.

    Args:
        model: folder, compressed or not; hub id, GGUF file or named sample.
        progress: receives every tensor.
        **options: the other options of the recipe.

    Returns:
        The files, their sizes, and how many zeros they keep.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(ExportRecipe, {"model": model}, options)
    return export_recipe(recipe, listener(progress), **call)


def export_recipe(
    recipe: ExportRecipe, progress: Progress, *, overwrite: bool = False
) -> ExportResult:
    """Carry out a recipe into a new folder.

    Args:
        recipe: the recipe.
        progress: receives every tensor.
        overwrite: replace an existing output folder.
    """
    begun = time.perf_counter()
    target = targets[recipe.to]
    type = recipe.type or target.types[0]
    if type not in target.types:
        raise RecipeError(
            f"{recipe.to} has no type {type!r}", remedy=did_you_mean(type, list(target.types))
        )
    if recipe.keep_zeros and type in target.lossy:
        keeping = [name for name in target.types if name not in target.lossy]
        raise RecipeError(
            f"{recipe.to} {type} does not keep exact zeros",
            where="--keep-zeros",
            remedy=f"types that do: {', '.join(keeping)}",
        )
    folder = RunFolder(recipe.output, "export", overwrite=overwrite)
    folder.keep_apart(recipe.model)
    found = resolve(recipe.model, progress=progress)
    folder.keep_apart(found.folder)
    name = Path(recipe.model.partition("@")[0]).name.removesuffix(".gguf") or found.folder.name
    source = ExportSource(
        name, found.folder, read_config(found.folder), open_checkpoint(found.folder)
    )
    with folder:
        made = folder.fresh_model()
        exported = target.write(source, type, made, progress)
        lost = exported.zeros - exported.zeros_kept
        message = f"{lost:,} of {exported.zeros:,} zeros were lost in {recipe.to} {type}"
        if lost and type not in target.lossy:
            raise VerificationError(
                message, where=str(folder.output), remedy="choose another --type"
            )
        if lost:
            exported.notes.insert(0, message)
        folder.notes.rmdir()
        files = tuple(sorted(file.name for file in made.iterdir()))
        folder.finish()
    seconds = time.perf_counter() - begun
    return ExportResult(recipe.to, type, folder.output, files, exported, seconds)
