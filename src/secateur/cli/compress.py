"""`secateur compress`: store a checkpoint without its zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.compress import CompressRecipe
    from secateur.reporting.results.compress import CompressResult


def _run(recipe: CompressRecipe, **call: Any) -> CompressResult:
    """Compress with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.compress.pack import compress_recipe

    with show_progress() as progress:
        return compress_recipe(recipe, progress, **call)


compress = command("compress", _run, exit_code=lambda result: 3 if result.broken else 0)
