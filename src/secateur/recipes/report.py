"""The recipe of `secateur report`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import OUTPUT, WHAT, Flag, Recipe, Section, Texts


class WhatToReport(Section):
    """The runs to show."""

    group: ClassVar[str] = WHAT

    runs: Annotated[Texts, Flag(value="DIR")] = Field(
        min_length=1,
        description="Run folders, compressed or not; folders of sweeps and fits; files that "
        "`secateur advise --json` wrote.",
    )


class ReportRecipe(WhatToReport, Recipe):
    """One page."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str, Flag(short="-o", value="FILE")] = Field(
        "report.html", description="The HTML file to write."
    )
    plots: bool = Field(
        False, description="Also write every chart as PNG and SVG, into a folder beside the page."
    )
    card: Annotated[str | None, Flag(value="FILE")] = Field(
        None,
        description="Also write a Markdown model card with all measurements (for one run only).",
    )
