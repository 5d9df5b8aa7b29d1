"""The recipe of `secateur import`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.run import OutputFolder, Overwriting
from secateur.recipes.section import WHAT, Flag, Recipe, Section


class WhatToImport(Section):
    """The model, and what is put on it."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="SOURCE")] = Field(
        description="Folder or hub id of a model with zeros: plain safetensors, "
        "compressed-tensors, or torch.nn.utils.prune; a dense model with --masks."
    )
    masks: Annotated[str | None, Flag(value="FILE", default="none")] = Field(
        None,
        description="Safetensors file of masks by the names of tensors, True = kept. They are "
        "applied to the model.",
    )
    adapter: Annotated[str | None, Flag(value="DIR", default="none")] = Field(
        None,
        description="Folder of an adapter that peft trained on the model. It is merged, and the "
        "zeros of the model stay zero.",
    )


class ImportRecipe(RemoteCode, WhatToImport, OutputFolder, Recipe):
    """One import."""

    run: ClassVar[type[Section] | None] = Overwriting
