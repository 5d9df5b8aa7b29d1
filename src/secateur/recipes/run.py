"""Options of one call. They are flags and keywords, but not keys of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import OUTPUT, Flag, Section


class OutputFolder(Section):
    """Where to write the result."""

    group: ClassVar[str] = OUTPUT

    output: Annotated[str | None, Flag(short="-o", value="DIR", default="required")] = Field(
        None, description="Folder for the new model. It must not exist."
    )


class Overwriting(Section):
    """What to do with an existing output."""

    group: ClassVar[str] = OUTPUT

    overwrite: bool = Field(False, description="Replace an existing output folder.")


class Resuming(Overwriting):
    """What to do with a stopped run."""

    resume: bool = Field(
        False,
        description="Resume a stopped run, or start if there is none. A finished one is shown.",
    )
    restart: bool = Field(False, description="Discard a stopped run and start again.")


class Planning(Resuming):
    """What to do with a stopped run, or whether to plan one only."""

    dry_run: bool = Field(
        False,
        description="Check the options and show what the run would need. Reads no weights, and "
        "writes nothing.",
    )
