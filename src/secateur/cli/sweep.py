"""`secateur sweep`: measure perplexity against sparsity for several methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.sweep import SweepRecipe

__all__ = ["sweep"]


def run(recipe: SweepRecipe) -> Any:
    """Sweep with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.sweep.plan import SweepPlan
    from secateur.workflows.sweep.run import sweep as run_sweep

    apart = ("output", "keep_models", "cluster")
    options = {key: value for key, value in recipe if key not in apart}
    with show_progress() as progress:
        return run_sweep(
            SweepPlan(**options),
            str(recipe.output),
            keep_models=recipe.keep_models,
            ray=recipe.cluster.ray,
            ray_processes=recipe.cluster.processes,
            progress=progress,
        )


def exit_code(result: Any) -> int:
    """1 if a point failed."""
    return int(bool(result.failures))


sweep = command("sweep", run, exit_code=exit_code)
