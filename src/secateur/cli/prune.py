"""`secateur prune`: prune a model into a new folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.prune import PruneRecipe
    from secateur.reporting.results.advise import ClusterPlanResult
    from secateur.reporting.results.plan import PlanResult
    from secateur.reporting.results.prune import PruneResult


def run(
    recipe: PruneRecipe, *, dry_run: bool = False, **call: Any
) -> PruneResult | PlanResult | ClusterPlanResult | None:
    """Prune with a progress bar, or plan. Of several processes, only the first one shows it."""
    from secateur.cli.progress import show_progress
    from secateur.parallel.processes import joined
    from secateur.workflows.prune.workers import run_worker
    from secateur.workflows.prune_and_pack import plan_recipe, prune_on_ray, prune_recipe

    if dry_run:
        return plan_recipe(recipe, call)
    if recipe.cluster.ray is not None:
        return prune_on_ray(recipe, call, show_progress)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_worker(recipe, ranks)
            return None
        with show_progress() as progress:
            return prune_recipe(recipe, progress, ranks=ranks, **call)


prune = command("prune", run)
