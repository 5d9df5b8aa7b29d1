"""The recipe of `secateur push`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import OUTPUT, WHAT, Flag, Recipe, Section, matching

REPOSITORY = r"[^/\s]+/[^/\s]+"


class WhatToPublish(Section):
    """The folder and the repository."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="DIR")] = Field(description="Folder of the model.")
    repo: Annotated[str, Flag(value="REPO"), matching(REPOSITORY, "OWNER/NAME")] = Field(
        description="Repository on the hub, OWNER/NAME. It is created if there is none."
    )


class HowToPublish(Section):
    """Who may see it, and where it goes."""

    group: ClassVar[str] = OUTPUT

    public: bool = Field(
        False, description="Make the repository public. Without this it is private."
    )
    branch: Annotated[str | None, Flag(value="NAME", default="main")] = Field(
        None, description="Branch of the repository; it is created if there is none."
    )
    base_model: Annotated[
        str | None,
        Flag(value="REPO", default="the one that the card names"),
        matching(REPOSITORY, "OWNER/NAME"),
    ] = Field(None, description="Base model for the card, OWNER/NAME on the hub.")
    dry_run: bool = Field(
        False, description="Check everything and show files and card. Nothing is sent."
    )


class PushRecipe(RemoteCode, HowToPublish, WhatToPublish, Recipe):
    """One upload."""
