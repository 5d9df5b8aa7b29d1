"""`secateur train`: train a pruned model and keep its zeros."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.train import TrainRecipe
    from secateur.reporting.results.plan import TrainPlanResult
    from secateur.reporting.results.prune import TrainResult


def run(
    recipe: TrainRecipe, *, dry_run: bool = False, **call: Any
) -> TrainResult | TrainPlanResult | None:
    """Train with a progress bar, or plan. Of several processes, only the first one shows it."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.train.checkpoint import plan_training, run_training

    if int(os.environ.get("RANK", "0")):
        run_training(recipe, **call)
        return None
    with show_progress() as progress:
        if dry_run:
            return plan_training(recipe, progress, call)
        return run_training(recipe, progress, **call)


train = command("train", run)
