"""The recipes of `secateur demo` and `secateur methods`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.prune import Effort
from secateur.recipes.section import CALIBRATION, HOW, OUTPUT, Flag, Recipe, Section


class DemoPruning(Section):
    """How the demo prunes."""

    group: ClassVar[str] = HOW

    sparsity: float = Field(0.5, gt=0, lt=1, description="Fraction of zeros.")
    effort: Effort = Field("balanced", description="Preset: fast, balanced or best.")


class DemoCalibration(Section):
    """How much text the demo reads to prune."""

    group: ClassVar[str] = CALIBRATION

    windows: int = Field(20, ge=1, description="Calibration windows of 512 tokens.")


class DemoJudging(Section):
    """How much text the demo reads to judge."""

    group: ClassVar[str] = HOW

    text_windows: int = Field(8, ge=1, description="Windows of 512 tokens to judge on.")


class DemoOutput(Section):
    """Where the demo writes."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str, Flag(short="-o", value="DIR")] = Field(
        "demo-run", description="Folder for the packed model and the report. It is replaced."
    )


class DemoRecipe(DemoOutput, DemoJudging, DemoCalibration, DemoPruning, Recipe):
    """One demo."""


class MethodsRecipe(Recipe):
    """The list of methods has no options."""
