"""The recipe of `secateur compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.calibration import TEXT, CalibrationWindows
from secateur.recipes.memory import Device, Memory
from secateur.recipes.prune import Values
from secateur.recipes.run import OutputFolder, Overwriting, Resuming
from secateur.recipes.section import CALIBRATION, WHAT, Flag, Recipe, Section


class RoundingSource(Section):
    """Where the text for rounding comes from, if any is used."""

    group: ClassVar[str] = CALIBRATION

    source: Annotated[str | None, Flag("calibration", value="TEXT", default="none")] = Field(
        None,
        description="Text on which rounded weights compensate each other's rounding errors: "
        + TEXT,
    )


class RoundingText(CalibrationWindows, RoundingSource):
    """The calibration text for rounding."""


class WhatToCompress(Section):
    """The model, and how its weights are stored."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder, hub id, GGUF file, named sample, or a recipe (`*.yaml`)."
    )
    format: str = Field(
        "auto",
        description="auto chooses the smallest format for each matrix. bitmask, n-of-m or dense "
        "uses that format, or dense where dense is smaller.",
    )
    values: Values = Field(
        "auto",
        description="How to store the weights. auto stores float32 as bfloat16 and keeps other "
        "types. keep keeps every type and loses nothing. Or name a type: bfloat16, float16, "
        "float32, int8, int4, int3.",
    )
    group_size: Annotated[int | None, Flag(default="64")] = Field(
        None,
        description="How many consecutive weights of a row share a scale in int4 and int3: 32, 64 "
        "or 128. "
        "Smaller groups lose less and need 8 / SIZE bits more per weight.",
    )
    overrides: Annotated[dict[str, str], Flag(value="GLOB=VALUES")] = Field(
        default_factory=dict,
        description="Own values for some linear layers, by name; the last match counts.",
    )
    max_loss_increase: Annotated[float | None, Flag(value="NATS", default="none")] = Field(
        None,
        gt=0,
        description="Let --values auto choose for each matrix: int4, int8 or the type of the "
        "source. The result is the smallest one found whose loss rises by at most so many nats "
        "per token, measured on calibration text (needs --calibration).",
    )
    embeddings: Literal["auto", "int8"] = Field(
        "auto", description="auto keeps embeddings and output head; int8 rounds them to int8."
    )
    archive: bool = Field(
        False, description="Also compress the files with zstandard. Loading decodes them."
    )


class CompressRecipe(Device, WhatToCompress, OutputFolder, Recipe):
    """One compression."""

    run: ClassVar[type[Section] | None] = Resuming
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        (
            *("field", "windows", "sequence_length", "seed", "packing"),
            *("max_memory", "activations", "micro_batch_tokens", "device"),
        ),
        ("calibration",),
    )

    calibration: RoundingText = Field(default_factory=lambda: RoundingText())
    memory: Memory = Field(default_factory=lambda: Memory())


class DecompressRecipe(OutputFolder, Recipe):
    """One decompression."""

    group: ClassVar[str] = WHAT
    run: ClassVar[type[Section] | None] = Overwriting

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder or hub id of a compressed model."
    )
