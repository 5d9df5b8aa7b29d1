"""`secateur evaluate`: measure a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import EvaluateRecipe
    from secateur.reporting.results.evaluate import EvaluateResult


def _run(recipe: EvaluateRecipe) -> EvaluateResult | None:
    """Evaluate with a progress bar. Of several processes, only the first one shows it."""
    from secateur.cli.progress import show_progress
    from secateur.parallel.processes import joined
    from secateur.progress import Silent
    from secateur.workflows.judge.evaluate import run_evaluation

    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_evaluation(recipe, Silent(), ranks=ranks)
            return None
        with show_progress() as progress:
            return run_evaluation(recipe, progress, ranks=ranks)


def _check(recipe: EvaluateRecipe) -> None:
    """Refuse wrong tasks before the model is looked up."""
    from secateur.evaluation.task_data import check_request

    check_request(recipe.tasks, source=recipe.task_data, limit=recipe.limit, shots=recipe.shots)


evaluate = command("evaluate", _run, check=_check)
