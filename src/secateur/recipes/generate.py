"""The recipe of `secateur generate`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import HOW, MAX_SEED, WHAT_TO_CONTINUE, Flag, Recipe, Section, Texts

__all__ = ["GenerateRecipe"]


class WhatToContinue(Section):
    """The model, and the text that it continues or answers."""

    group: ClassVar[str] = WHAT_TO_CONTINUE

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file, named sample, or a recipe "
        "(`*.yaml`)."
    )
    prompt: Annotated[
        str | None,
        Flag(short="-p", value="WORDS", default="a conversation on a terminal, else stdin"),
    ] = Field(None, description="Text to continue, or with a chat template a message to answer.")
    system: Annotated[str | None, Flag(value="WORDS")] = Field(
        None, description="System message at the start of the conversation."
    )
    chat: Annotated[bool | None, Flag(off="no_chat", default="on, if it has one")] = Field(
        None, description="Use the tokenizer's chat template."
    )


class TokenDrawing(Section):
    """How tokens are sampled, and where a text ends."""

    group: ClassVar[str] = HOW

    max_new_tokens: Annotated[int | None, Flag(default="256")] = Field(
        None, description="Stop after this many tokens."
    )
    temperature: float = Field(
        0.0, description="0 always takes the most likely token; higher values sample."
    )
    top_k: Annotated[int | None, Flag(default="all")] = Field(
        None, description="Sample only from this many most likely tokens."
    )
    top_p: float = Field(
        1.0, description="Sample only from the most likely tokens that add up to this probability."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed for sampling.")
    stop: Annotated[Texts, Flag(value="WORDS")] = Field(
        (), description="Stop before the model writes this text; may be repeated."
    )


class GenerateRecipe(RemoteCode, TokenDrawing, WhatToContinue, Recipe):
    """One text, or one conversation."""
