"""`secateur plan`: show what a run would need, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.plan import PlanRecipe
    from secateur.reporting.results.cluster_plan import ClusterPlanResult
    from secateur.reporting.results.plan import PlanResult

__all__ = ["plan"]


def run(recipe: PlanRecipe, **_: Any) -> PlanResult | ClusterPlanResult:
    """Plan without a progress bar, since it takes only seconds."""
    from secateur.workflows.prune.checkpoint import plan_recipe

    return plan_recipe(recipe)


plan = command("plan", run)
