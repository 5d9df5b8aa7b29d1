"""The recipe of `draft`: a model that proposes tokens to its parent."""

from __future__ import annotations

from typing import Annotated

from secateur.recipes.compress import FitRecipe, FitText, HowToSearch
from secateur.recipes.options import Flag, Heading, Recipe, Section
from secateur.recipes.shared import Device, Memory, OutputFolder, Planning


class _WhatToDraft(Section):
    """The model that a draft is made of, and the one that it proposes to."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder, hub id, GGUF file or named sample: the parent. The draft is made from its weights."""
    runs_as: Annotated[str | None, Flag(value="FOLDER", default="MODEL")] = None
    """Folder of the same model as it runs, if it is packed: the draft is measured and timed beside
    it."""


class DraftRecipe(Device, HowToSearch, _WhatToDraft, OutputFolder, Recipe):
    """One draft."""

    run = Planning

    calibration: FitText = FitText()
    memory: Memory = Memory()

    @property
    def fitted(self) -> FitRecipe:
        """How models are made on the way: as by a fit whose seconds are counted."""
        shared = FitRecipe.model_fields.keys() & DraftRecipe.model_fields.keys()
        given = {name: getattr(self, name) for name in shared}
        return FitRecipe(**given, decode_speedup=1.0)
