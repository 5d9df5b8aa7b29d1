"""The recipe of `secateur bench`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic import Strict as Strictness

from secateur.recipes.section import HOW, WHAT, Flag, Recipe, Section, Texts

Contender = Literal[
    "packed",
    "packed in transformers",
    "dense bf16",
    "dense int8",
    "torch bf16",
    "torch int8",
    "all",
]
"""The names of the ways to run a model; `secateur.evaluation.speed` has them."""


class WhatToTime(Section):
    """The model, and the ways to run it."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id or named sample."
    )
    contenders: Annotated[
        Annotated[tuple[Contender, ...], Strictness(False)] | None,
        Flag(commas=True, default="packed, dense bf16, dense int8, torch bf16"),
    ] = Field(
        None,
        description="Ways to run the model, separated by commas: packed, packed in transformers, "
        "dense bf16, dense int8, torch bf16, torch int8; or all.",
    )
    gguf: Annotated[Texts, Flag(value="FILE")] = Field(
        (), description="Also time this GGUF file in llama.cpp (needs xllamacpp); may be repeated."
    )


class TimedRounds(Section):
    """How many tokens and rounds are timed."""

    group: ClassVar[str] = HOW

    prompt_tokens: int = Field(32, ge=1, description="Tokens in the prompt.")
    new_tokens: int = Field(8, ge=2, description="Tokens to generate in each round.")
    rounds: int = Field(5, ge=1, description="Largest number of rounds.")
    seconds: float = Field(
        30.0,
        gt=0,
        description="Start no round after this many seconds; at least two rounds are timed.",
    )


class BenchRecipe(TimedRounds, WhatToTime, Recipe):
    """One timing."""
