"""`secateur prune --dry-run`: what a recipe would need, on this machine or on paper for others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from secateur.engine.plan_time import (
    QUICKER,
    SLOWER,
    basis_seconds,
    foretell_seconds,
    layer_times,
    learning_seconds,
    writing_seconds,
)
from secateur.engine.prepared import choose_plan, prepare, settings_of
from secateur.engine.prune.tasks import skipped_matrices
from secateur.progress import Progress
from secateur.recipes.prune import PruneCall, PruneRecipe
from secateur.recipes.shared import texts_of
from secateur.recipes.verbs import imported
from secateur.reporting.plan import PlanResult
from secateur.reporting.tables import Result
from secateur.runs.folder import check_output
from secateur.steps.prune import chain_of
from secateur.steps.runner import source_of


def plan_recipe(
    recipe: PruneRecipe, progress: Progress, call: Mapping[str, Any]
) -> PlanResult | Result:
    """Check a recipe, and show what it would need, on this machine or on paper for others.

    Args:
        recipe: recipe of the pruning.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    packs = recipe.compress.values is not None
    if packs:
        from secateur.steps.chain import ChainSteps

        ChainSteps.check(chain_of(recipe))
    cluster_call = PruneCall(dry_run=True, **call)
    if cluster_call.gpus is not None:
        planned: Result = imported("secateur.advisor.cluster:plan_on_paper")(recipe, cluster_call)
        return planned
    plan = plan_pruning(recipe, progress)
    read = recipe.model, *texts_of(recipe.calibration.source)
    check_output(recipe.output, "chain" if packs else "prune", plan.plan.disk_bytes, read, call)
    return plan


def plan_pruning(recipe: PruneRecipe, progress: Progress) -> PlanResult:
    """What a recipe would need on this machine."""
    began = time.perf_counter()
    prepared = prepare(recipe, source_of(recipe, progress), only_plan=True, pictures=True)
    ready = time.perf_counter() - began
    tasks, target, windows = prepared.tasks(), prepared.target, prepared.windows
    plan, activations = choose_plan(prepared, tasks, recipe.memory)
    settings = settings_of(recipe, activations, None)
    shared_inputs = [
        tuple(f"{target.architecture.layer_name(index)}.{name}" for name in group)
        for index, layout in enumerate(prepared.layouts)
        for group in layout.groups
    ]
    times = layer_times(target, None if windows is None else windows.planned, settings)
    pruning = foretell_seconds(
        tasks,
        [(name,) for name in tasks] if windows is None else shared_inputs,
        times,
        ready=ready,
        passed=plan.passed_tokens - plan.learning_tokens,
        output_bytes=prepared.output_bytes,
        tokens=plan.calibration_tokens,
        settings=settings,
        device=target.device,
    )
    parts = {"pruning": pruning}
    if windows is not None:
        how, length = recipe.distillation, windows.planned.shape[1]
        steps = how.epochs * (len(windows.planned) + len(windows.extra))
        trials = how.peak_learning_rate is None
        if windows.ungenerated:
            parts["generating windows"] = writing_seconds(target, length, windows.ungenerated)
        if settings.value_basis == "learned":
            parts |= basis_seconds(target, tasks, times, plan.calibration_tokens)
        parts |= learning_seconds(target, times, plan.learning_tokens, steps, trials=trials)
    ranges = {name: (QUICKER * x, SLOWER * x) for name, x in parts.items()}
    left = skipped_matrices(tasks, target.matrices())
    return PlanResult(replace(plan, left=left, seconds_of_parts=ranges), activations)
