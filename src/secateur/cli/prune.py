"""`secateur prune`: prune a model into a new folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.prune import PruneRecipe
    from secateur.reporting.results.prune import PruneResult

__all__ = ["prune"]


def run(recipe: PruneRecipe, **call: Any) -> PruneResult:
    """Prune with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.prune_and_pack import prune_recipe

    with show_progress() as progress:
        return prune_recipe(recipe, progress, **call)


prune = command("prune", run)
