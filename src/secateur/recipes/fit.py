"""The recipe of `secateur fit`."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from secateur.recipes.calibration import CalibrationText, CalibrationWindows
from secateur.recipes.memory import Device, Memory
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import HOW, WHAT_TO_COMPRESS, Flag, Recipe, Section

__all__ = ["FitRecipe", "FitText", "bytes_of"]

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(size: str) -> int | None:
    """The bytes of a size such as `90MiB`, `4GiB` or `120000000`; None if it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower())
    if found is None or found[2] not in UNITS:
        return None
    return round(float(found[1]) * UNITS[found[2]])


class FitText(CalibrationWindows, CalibrationText):
    """The text that levels are made with, and that chooses among them."""


class WhatToFit(Section):
    """The model, and the bounds."""

    group: ClassVar[str] = WHAT_TO_COMPRESS

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder, hub id, GGUF file or named sample."
    )
    max_size: Annotated[str | None, Flag(value="SIZE", default="any")] = Field(
        None, description="Largest size of the weight files, such as 90MiB or 4GB. The result is "
        "the best one found that fits."
    )  # fmt: skip
    max_loss_increase: Annotated[float | None, Flag(value="NATS", default="any")] = Field(
        None, gt=0, description="Most that the loss of the next token may rise, in nats. Without "
        "a size, the result is the smallest one found within it."
    )  # fmt: skip


class HowToSearch(Section):
    """How the levels are made, and how long the search is."""

    group: ClassVar[str] = HOW

    effort: Literal["fast", "balanced", "best"] = Field(
        "balanced", description="The preset that makes the pruned levels."
    )
    structure: bool = Field(
        True,
        description="Also try models with fewer layers or FFN neurons, where zeros and rounding "
        "lose much.",
    )
    generations: int = Field(
        10, ge=0, description="Generations of the search; 0 takes the first candidate."
    )
    offspring: int = Field(8, ge=1, description="Candidates of a generation.")


class FitRecipe(Device, HowToSearch, WhatToFit, OutputFolder, Recipe):
    """One fit."""

    run: ClassVar[type[Section] | None] = Resuming

    calibration: FitText = Field(default_factory=lambda: FitText())
    memory: Memory = Field(default_factory=lambda: Memory())

    @model_validator(mode="after")
    def check_bounds(self) -> FitRecipe:
        """There is a bound, and a size can be read."""
        if self.max_size is None and self.max_loss_increase is None:
            raise ValueError("give a bound: max_size, max_loss_increase, or both")
        if self.max_size is not None and not bytes_of(self.max_size):
            raise ValueError(f"max_size {self.max_size!r} is no size; write 90MiB, 4GB or bytes")
        return self
