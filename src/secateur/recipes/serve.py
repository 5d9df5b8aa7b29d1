"""The recipe of `secateur serve`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import HOW, WHAT, Flag, Recipe, Section
from secateur.recipes.sizes import Size, SizeOrZero


class ServedModel(Section):
    """The model, its name, and where it listens."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file or named sample."
    )
    name: Annotated[str | None, Flag(default="the name of the folder")] = Field(
        None, description="The name of the model in the API."
    )
    host: Annotated[str, Flag(value="ADDRESS")] = Field(
        "127.0.0.1",
        description="The address to listen on. 0.0.0.0 lets other machines connect; give an API "
        "key then.",
    )
    port: int = Field(8000, ge=0, le=65535, description="The port; 0 takes a free one.")
    api_key: Annotated[str | None, Flag(value="KEY", default="SECATEUR_API_KEY, else none")] = (
        Field(
            None,
            description="Clients have to send this key. Other users of this machine can read "
            "flags, but not environment variables.",
        )
    )


class ServingLimits(Section):
    """How much is computed at once, and what a client may ask."""

    group: ClassVar[str] = HOW

    slots: int = Field(8, ge=1, le=8, description="Requests that are computed together.")
    context_length: Annotated[int | None, Flag(default="the model's positions, at most 4096")] = (
        Field(None, ge=2, description="Tokens that a prompt and its answer may have together.")
    )
    queue: int = Field(
        64, ge=0, description="Requests that may wait. More are refused with status 429."
    )
    request_seconds: float = Field(
        600.0, gt=0, description="A request ends after this many seconds, waiting included."
    )
    prefix_cache: Annotated[SizeOrZero, Flag(value="SIZE")] = Field(
        "256MiB", description="Memory for the prefix cache; 0: no cache."
    )
    prompt_piece: Annotated[int, Flag(advanced=True)] = Field(
        128, ge=16, description="Chunk size of chunked prefill, in tokens."
    )
    max_body: Annotated[Size, Flag(value="SIZE", advanced=True)] = Field(
        "4MiB", description="The longest body of a request."
    )
    stop_seconds: float = Field(
        30.0, gt=0, description="How long running requests may go on after SIGTERM."
    )


class ServeRecipe(RemoteCode, ServingLimits, ServedModel, Recipe):
    """One server."""
