"""The recipes of `secateur generate` and `secateur chat`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import HOW, MAX_SEED, WHAT, Flag, Recipe, Section, Texts


class WhatToContinue(Section):
    """The model, and the text that it continues or answers."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file, named sample, or a recipe "
        "(`*.yaml`)."
    )
    prompt: Annotated[
        str | None,
        Flag(short="-p", value="WORDS", default="read from stdin"),
    ] = Field(None, description="Text to continue, or with a chat template a message to answer.")
    system: Annotated[str | None, Flag(value="WORDS")] = Field(
        None, description="System message at the start of the conversation."
    )
    chat: Annotated[bool | None, Flag(off="no_chat", default="on, if it has one")] = Field(
        None, description="Use the tokenizer's chat template."
    )


MODELS_OWN = "the model's generation_config.json, else {}"


class TokenDrawing(Section):
    """How tokens are sampled, and where a text ends."""

    group: ClassVar[str] = HOW

    max_new_tokens: Annotated[int | None, Flag(default="256")] = Field(
        None, gt=0, description="Stop after this many tokens."
    )
    temperature: Annotated[float | None, Flag(default=MODELS_OWN.format(0))] = Field(
        None, ge=0, description="0 always takes the most likely token; higher values sample."
    )
    top_k: Annotated[int | None, Flag(default=MODELS_OWN.format("all"))] = Field(
        None, ge=0, description="Sample only from this many most likely tokens; 0 for all."
    )
    top_p: Annotated[float | None, Flag(default=MODELS_OWN.format(1))] = Field(
        None,
        gt=0,
        le=1,
        description="Sample only from the most likely tokens that add up to this probability.",
    )
    min_p: Annotated[float | None, Flag(default=MODELS_OWN.format(0))] = Field(
        None,
        ge=0,
        le=1,
        description="Sample only from tokens of at least this share of the largest probability.",
    )
    repetition_penalty: Annotated[float | None, Flag(default=MODELS_OWN.format(1))] = Field(
        None,
        gt=0,
        description="Above 1: tokens of the prompt and the text become less likely. Divides "
        "positive logits, multiplies negative ones.",
    )
    presence_penalty: float = Field(
        0.0, description="Subtract this from the logits of tokens that the text has."
    )
    frequency_penalty: float = Field(
        0.0, description="Subtract this once for each time that the text has the token."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed for sampling.")
    stop: Annotated[Texts, Flag(value="WORDS")] = Field(
        (), description="Stop before the model writes this text; may be repeated."
    )

    def drawing(self) -> dict[str, Any]:
        """The options of `Sampling`, None where not given."""
        names = set(TokenDrawing.model_fields) - {"max_new_tokens", "stop"}
        return {name: getattr(self, name) for name in names}


class GenerateRecipe(RemoteCode, TokenDrawing, WhatToContinue, Recipe):
    """One text."""


class WhatToTalkTo(Section):
    """The model, and how a conversation begins."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file or named sample."
    )
    system: Annotated[str | None, Flag(value="WORDS")] = Field(
        None, description="System message at the start of the conversation."
    )


class ChatRecipe(RemoteCode, TokenDrawing, WhatToTalkTo, Recipe):
    """One conversation."""
