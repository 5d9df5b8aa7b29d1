"""`secateur structure`: cut layers, heads, neurons, channels or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.structure import StructureRecipe
    from secateur.reporting.results.structure import StructureResult

__all__ = ["structure"]


def run(recipe: StructureRecipe, **call: Any) -> StructureResult:
    """Cut with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.structure.checkpoint import structure_recipe

    with show_progress() as progress:
        return structure_recipe(recipe, progress, **call)


structure = command("structure", run)
