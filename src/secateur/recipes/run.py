"""Options of one call. They are flags and keywords, but no keys of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import OUTPUT, Flag, Section

__all__ = ["OutputFolder", "Overwriting", "Resuming"]


class OutputFolder(Section):
    """Where the result is written."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="DIR", default="required")] = Field(
        None, description="Folder for the new model. It must not exist."
    )


class Overwriting(Section):
    """What happens to an output that exists."""

    group: ClassVar[str] = OUTPUT

    overwrite: bool = Field(False, description="Replace an existing output folder.")


class Resuming(Overwriting):
    """What happens to a run that was stopped."""

    resume: bool = Field(False, description="Resume a stopped run; start if there is none.")
    restart: bool = Field(False, description="Discard a stopped run and start again.")
