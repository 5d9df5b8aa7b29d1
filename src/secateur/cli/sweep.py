"""`secateur sweep`: measure perplexity against sparsity for several methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import SweepRecipe


def _run(recipe: SweepRecipe) -> Any:
    """Sweep with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.sweep.run import sweep_recipe

    with show_progress() as progress:
        return sweep_recipe(recipe, progress)


def _exit_code(result: Any) -> int:
    """1 if a point failed."""
    return int(bool(result.failures))


sweep = command("sweep", _run, exit_code=_exit_code)
