"""`secateur advise`: prune, quantize, both, distil, or leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import AdviseRecipe
    from secateur.reporting.results.advise import AdviseResult


def _run(recipe: AdviseRecipe) -> AdviseResult:
    """Advise with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.advise import advise_recipe

    with show_progress() as progress:
        return advise_recipe(recipe, progress)


advise = command("advise", _run, exit_code=lambda result: 0 if result.advice.chosen else 3)
