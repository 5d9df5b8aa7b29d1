"""`secateur prune --dry-run`: what a recipe would need on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from secateur.engine.plan_time import estimate_seconds
from secateur.engine.prepared import choose_plan, prepare
from secateur.engine.prune.tasks import Settings, skipped_matrices
from secateur.parallel.ranks import Ranks
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.shared import texts_of
from secateur.reporting.plan import PlanResult
from secateur.runs.folder import check_output
from secateur.steps.runner import source_of


def plan_recipe(recipe: PruneRecipe, progress: Progress, call: Mapping[str, Any]) -> PlanResult:
    """Check a recipe, and show what it would need on this machine.

    Args:
        recipe: recipe of the pruning.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    packs = recipe.compress is not None
    if packs:
        from secateur.steps.chain import PruneAndCompress

        PruneAndCompress.check(recipe)
    plan = plan_pruning(recipe, progress, recipe.cluster.processes or 1)
    read = recipe.model, *texts_of(recipe.calibration.source)
    check_output(recipe.output, "prune", plan.plan.disk_bytes, read, call)
    return plan


def plan_pruning(recipe: PruneRecipe, progress: Progress, processes: int = 1) -> PlanResult:
    """What a recipe would need on this machine: its first process, if it has several."""
    prepared = prepare(recipe, source_of(recipe, progress), only_plan=True)
    tasks = prepared.tasks()
    ranks = Ranks(0, processes, processes)
    plan, activations = choose_plan(prepared, tasks, recipe.memory, ranks)
    settings = Settings.of(recipe, activations)
    seconds = estimate_seconds(prepared, tasks, settings, plan.passed_tokens)
    left = skipped_matrices(tasks, prepared.target.matrices())
    plan = replace(plan, left=left, seconds=seconds)
    return PlanResult(plan=plan, activations=activations, processes=processes)
