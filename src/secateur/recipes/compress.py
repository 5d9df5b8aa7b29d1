"""The recipe of `secateur compress`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.calibration import TEXT, CalibrationWindows
from secateur.recipes.memory import Device, Memory
from secateur.recipes.run import OutputFolder, Overwriting, Resuming
from secateur.recipes.section import CALIBRATION, WHAT_TO_COMPRESS, Flag, Recipe, Section

__all__ = ["CompressRecipe", "DecompressRecipe", "RoundingText"]


class RoundingSource(Section):
    """A text, or none."""

    group: ClassVar[str] = CALIBRATION

    source: Annotated[str | None, Flag("calibration", value="TEXT", default="none")] = Field(
        None,
        description="Text on which int8 weights compensate each other's rounding errors: " + TEXT,
    )


class RoundingText(CalibrationWindows, RoundingSource):
    """The text that int8 weights are rounded on."""


class WhatToCompress(Section):
    """The model, and how its numbers are stored."""

    group: ClassVar[str] = WHAT_TO_COMPRESS

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder, hub id, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    format: str = Field(
        "auto",
        description="auto takes the smallest format for each matrix. bitmask, n-of-m or dense "
        "takes that one, or dense where it is smaller.",
    )
    values: str = Field(
        "auto",
        description="auto stores float32 as bfloat16 and other types as they are. keep stores all "
        "as they are and loses nothing. bfloat16, float16, float32 or int8 stores that.",
    )
    embeddings: Literal["auto", "int8"] = Field(
        "auto", description="auto keeps embedding and head as they are. int8 stores them so."
    )
    archive: bool = Field(
        False, description="Make the smallest files. They are unpacked when they are loaded."
    )


class CompressRecipe(Device, WhatToCompress, OutputFolder, Recipe):
    """One compression."""

    run: ClassVar[type[Section] | None] = Resuming

    calibration: RoundingText = Field(default_factory=lambda: RoundingText())
    memory: Memory = Field(default_factory=lambda: Memory())


class DecompressRecipe(OutputFolder, Recipe):
    """One decompression."""

    group: ClassVar[str] = WHAT_TO_COMPRESS
    run: ClassVar[type[Section] | None] = Overwriting

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder or hub id of a compressed model."
    )
