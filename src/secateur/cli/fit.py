"""`secateur fit`: a budget in, the best model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.compress import FitRecipe
    from secateur.reporting.results.fit import FitResult
    from secateur.reporting.results.plan import FitPlanResult


def run(recipe: FitRecipe, *, dry_run: bool = False, **call: Any) -> FitResult | FitPlanResult:
    """Fit with a progress bar, or plan."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.fit.run import fit_recipe, plan_fit

    with show_progress() as progress:
        if dry_run:
            return plan_fit(recipe, progress, call)
        return fit_recipe(recipe, progress, **call)


def _exit_code(result: Any) -> int:
    """3 if the made model breaks a bound."""
    return 3 if getattr(result, "broken", False) else 0


def _check(recipe: FitRecipe) -> None:
    """Refuse a target that a fit cannot serve before the model is looked up."""
    from secateur.workflows.fit.run import check_target

    check_target(recipe)


fit = command("fit", run, exit_code=_exit_code, check=_check)
