"""`secateur inspect`: show the parts of a model, and where its zeros are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import InspectRecipe


def _run(recipe: InspectRecipe) -> Any:
    """Inspect with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.judge.inspect import inspect as run_inspection

    with show_progress() as progress:
        return run_inspection(**dict(recipe), progress=progress)


inspect = command("inspect", _run)
