"""`secateur methods`: list presets, methods and their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.prune import MethodsRecipe
    from secateur.reporting.results.methods import MethodsResult


def _run(recipe: MethodsRecipe) -> MethodsResult:
    """List them."""
    from secateur.workflows.prune.composition import methods

    return methods()


methods = command("methods", _run)
