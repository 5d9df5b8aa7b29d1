"""`secateur import`: make an ordinary folder from what another tool wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.exchange import ImportRecipe
    from secateur.reporting.results.export import ImportResult


def _run(recipe: ImportRecipe, **call: Any) -> ImportResult:
    """Import with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.import_model import import_recipe

    with show_progress() as progress:
        return import_recipe(recipe, progress, **call)


import_model = command("import", _run)
