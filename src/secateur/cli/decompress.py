"""`secateur decompress`: restore a dense checkpoint that any engine loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.compress import DecompressRecipe
    from secateur.reporting.results.compress import DecompressResult


def _run(recipe: DecompressRecipe, **call: Any) -> DecompressResult:
    """Decompress with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.compress.unpack import decompress_recipe

    with show_progress() as progress:
        return decompress_recipe(recipe, progress, **call)


decompress = command("decompress", _run)
