"""The recipe of `secateur chain`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic import Strict as Strictness

from secateur.recipes.memory import RemoteCode
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import WHAT, Flag, Recipe, Section


class Steps(Section):
    """The model, and the steps to run on it."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="RECIPE")] = Field(
        description="YAML file with the keys `model`, `output` and `steps`: a list of verbs with "
        "their options."
    )
    steps: Annotated[list[dict[str, Any]], Strictness(False), Flag(hidden=True)] = Field(
        min_length=1,
        description="Each step is a verb (structure, prune, train, compress) with its options.",
    )


class ChainRecipe(RemoteCode, Steps, OutputFolder, Recipe):
    """Several verbs in a row. Each works on the result of the one before it."""

    run: ClassVar[type[Section] | None] = Resuming
