"""The recipe of `secateur inspect`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import WHAT, Flag, Recipe, Section


class WhatToInspect(Section):
    """The model, and the part of it to list."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder, GGUF file or named sample."
    )
    layer: Annotated[int | None, Flag(default="a line for each layer")] = Field(
        None, ge=0, description="List the linear layers of this decoder layer."
    )
    zeros: bool = Field(
        False,
        description="Count the zeros of a GGUF file too. Without it only the header is read.",
    )


class InspectRecipe(RemoteCode, WhatToInspect, Recipe):
    """One inspection."""
