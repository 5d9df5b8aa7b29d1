"""`secateur chain`: run several verbs from one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.prune import ChainRecipe
    from secateur.reporting.results.prune import ChainResult


def _run(recipe: ChainRecipe, **call: Any) -> ChainResult:
    """Run all steps with a progress bar."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.chain import run_chain

    with show_progress() as progress:
        return run_chain(recipe, progress, **call)


chain = command("chain", _run)
