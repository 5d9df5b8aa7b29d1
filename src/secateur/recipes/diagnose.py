"""The recipe of `secateur diagnose`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import Device
from secateur.recipes.section import HOW, WHAT, Flag, Recipe, Section


class WhatToDiagnose(Section):
    """The model, and what it is compared with."""

    group: ClassVar[str] = WHAT

    model: Annotated[str | None, Flag(value="MODEL", positional=True, default="none")] = Field(
        None,
        description="Folder (compressed or not), hub id, GGUF file or named sample. Required, "
        "except with --machine.",
    )
    dense: Annotated[str | None, Flag(value="MODEL")] = Field(
        None, description="The dense model. Compares both models layer by layer."
    )
    training_log: Annotated[str | None, Flag(value="FILE")] = Field(
        None, description="Also check this training log: JSON lines with step, loss, learning_rate."
    )
    machine: bool = Field(False, description="Only show what this machine can speed up.")


class TextForDiagnosis(Section):
    """What both models read."""

    group: ClassVar[str] = HOW

    text: Annotated[str, Flag(value="TEXT")] = Field(
        "boolq-held-out",
        description="Text that both models read: a text, or a safetensors file of windows.",
    )
    windows: int = Field(8, gt=0, description="Number of windows of that text.")
    sequence_length: Annotated[
        int | None, Flag(default="256, or the model's length if that is shorter")
    ] = Field(None, gt=1, description="Tokens per window.")


class DiagnoseRecipe(Device, TextForDiagnosis, WhatToDiagnose, Recipe):
    """One diagnosis."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("text", "windows", "sequence_length"), ("dense",)
    )
