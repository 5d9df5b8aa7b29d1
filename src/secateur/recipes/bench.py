"""The recipe of `secateur bench`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.section import HOW, WHAT_TO_MEASURE, Flag, Recipe, Section, Texts

__all__ = ["BenchRecipe"]


class WhatToTime(Section):
    """The model, and the ways in which it runs."""

    group: ClassVar[str] = WHAT_TO_MEASURE

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id or named sample."
    )
    contenders: Annotated[
        Texts | None, Flag(commas=True, default="packed, dense bf16, dense int8, torch bf16")
    ] = Field(
        None,
        description="Ways to run the model, with commas between: packed, packed in transformers, "
        "dense bf16, dense int8, torch bf16, torch int8; or all.",
    )
    gguf: Annotated[Texts, Flag(value="FILE")] = Field(
        (), description="GGUF file for llama.cpp (needs xllamacpp); may be repeated."
    )


class TimedRounds(Section):
    """How much is timed."""

    group: ClassVar[str] = HOW

    prompt_tokens: int = Field(32, description="Length of the prompt.")
    new_tokens: int = Field(8, description="Tokens written in each round.")
    rounds: int = Field(5, description="Rounds, at most.")
    seconds: float = Field(
        30.0, description="Begin no round after this time; two rounds are always made."
    )


class BenchRecipe(TimedRounds, WhatToTime, Recipe):
    """One timing."""
