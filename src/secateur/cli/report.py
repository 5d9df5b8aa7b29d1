"""`secateur report`: write one page about pruned models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import ReportRecipe


def _run(recipe: ReportRecipe) -> Any:
    """Write the page."""
    from secateur.workflows.report import report as write_report

    return write_report(**dict(recipe))


report = command("report", _run)
