"""`secateur sweep`: carries out the recipe of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.sweep import SweepRecipe
from secateur.reporting.results.sweep import SweepResult
from secateur.workflows.sweep.plan import SweepPlan
from secateur.workflows.sweep.run import sweep_plan


@takes_options_of(SweepRecipe)
def sweep(model: str | Path, *, progress: Progress | None = None, **options: Any) -> SweepResult:
    """Prune and evaluate a model with several methods at several sparsities.

    A point that fails is recorded as a failure, and the sweep continues. The next call with the
    same output resumes the sweep, and tries failed points again.

    Args:
        model: hub id, folder, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The points, and the dense model's perplexities.

    Raises:
        SecateurError: what, where, and what to do.
    """
    return sweep_recipe(recipe_of(SweepRecipe, {"model": model}, options)[0], progress)


def sweep_recipe(recipe: SweepRecipe, progress: Progress | None) -> SweepResult:
    """Carry out a recipe.

    Raises:
        RecipeError: there is no output folder.
    """
    if recipe.output is None:
        raise RecipeError("no output folder", remedy="add --output DIR")
    shared = {name: getattr(recipe, name) for name in SweepPlan.__dataclass_fields__}
    return sweep_plan(
        SweepPlan(**shared),
        recipe.output,
        keep_models=recipe.keep_models,
        ray=recipe.cluster.ray,
        ray_processes=recipe.cluster.processes,
        progress=progress,
    )
