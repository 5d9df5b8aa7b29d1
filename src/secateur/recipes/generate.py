"""The recipe of `secateur generate`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import HOW, MAX_SEED, WHAT_TO_CONTINUE, Flag, Recipe, Section, Texts

__all__ = ["GenerateRecipe"]


class WhatToContinue(Section):
    """The model, and what it continues or answers."""

    group: ClassVar[str] = WHAT_TO_CONTINUE

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file, named sample, or a recipe "
        "(`*.yaml`)."
    )
    prompt: Annotated[
        str | None,
        Flag(short="-p", value="WORDS", default="a conversation on a terminal, else stdin"),
    ] = Field(None, description="Continue this text, or answer this message.")
    system: Annotated[str | None, Flag(value="WORDS")] = Field(
        None, description="Begin the conversation with this system message."
    )
    chat: Annotated[bool | None, Flag(off="no_chat", default="on, if it has one")] = Field(
        None, description="Use the chat template of the tokenizer."
    )


class TokenDrawing(Section):
    """How tokens are drawn, and where a text ends."""

    group: ClassVar[str] = HOW

    max_new_tokens: Annotated[int | None, Flag(default="256")] = Field(
        None, description="Stop after this many tokens."
    )
    temperature: float = Field(
        0.0, description="0 takes the most likely token each time; above 0 draws."
    )
    top_k: Annotated[int | None, Flag(default="all")] = Field(
        None, description="Draw among this many of the most likely tokens."
    )
    top_p: float = Field(
        1.0, description="Draw among the tokens that together have this probability."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of the draw.")
    stop: Annotated[Texts, Flag(value="WORDS")] = Field(
        (), description="End the text before this one; may be repeated."
    )


class GenerateRecipe(RemoteCode, TokenDrawing, WhatToContinue, Recipe):
    """One text, or one conversation."""
