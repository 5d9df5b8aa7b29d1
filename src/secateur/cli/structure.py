"""`secateur structure`: cut layers, heads, neurons, channels or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.structure import StructureRecipe
    from secateur.reporting.results.plan import CutPlanResult
    from secateur.reporting.results.prune import StructureResult


def run(
    recipe: StructureRecipe, *, dry_run: bool = False, **call: Any
) -> StructureResult | CutPlanResult | None:
    """Cut with a progress bar, or plan. Of several processes, only the first one shows it."""
    from secateur.cli.progress import show_progress
    from secateur.parallel.processes import joined
    from secateur.workflows.structure.run import plan_structure, structure_recipe
    from secateur.workflows.structure.steps import run_worker

    if dry_run:
        return plan_structure(recipe, call)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_worker(recipe, ranks)
            return None
        with show_progress() as progress:
            return structure_recipe(recipe, progress, ranks=ranks, **call)


structure = command("structure", run)
