"""`secateur push`: publish a model on the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.exchange import PushRecipe
    from secateur.reporting.results.export import PushResult


def _run(recipe: PushRecipe) -> PushResult:
    """Publish with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.push import push_recipe

    with show_progress() as progress:
        return push_recipe(recipe, progress)


push = command("push", _run)
