"""`secateur fit`: a budget in, the best model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.fit import FitRecipe
    from secateur.reporting.results.fit import FitResult

__all__ = ["fit"]


def run(recipe: FitRecipe, **call: Any) -> FitResult:
    """Fit with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.fit.run import fit_recipe

    with show_progress() as progress:
        return fit_recipe(recipe, progress, **call)


def check(recipe: FitRecipe) -> None:
    """Refuse a target that a fit cannot serve before the model is looked up."""
    from secateur.workflows.fit.targets import check_target

    check_target(recipe)


fit = command("fit", run, exit_code=lambda result: 3 if result.broken else 0, check=check)
