"""`secateur export`: write a model for another engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.exchange import ExportRecipe
    from secateur.reporting.results.export import ExportResult


def _run(recipe: ExportRecipe, **call: Any) -> ExportResult:
    """Export with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.export import export_recipe

    with show_progress() as progress:
        return export_recipe(recipe, progress, **call)


export = command("export", _run)
