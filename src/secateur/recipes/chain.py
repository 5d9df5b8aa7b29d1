"""The recipe of `secateur chain`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic import Strict as Strictness

from secateur.recipes.memory import RemoteCode
from secateur.recipes.run import OutputFolder, Resuming
from secateur.recipes.section import WHAT_TO_PRUNE, Flag, Recipe, Section

__all__ = ["ChainRecipe"]


class Steps(Section):
    """The model, and what is done with it."""

    group: ClassVar[str] = WHAT_TO_PRUNE

    model: Annotated[str, Flag(value="RECIPE")] = Field(
        description="YAML file with a model, an output and steps: a list of verbs with their "
        "options."
    )
    steps: Annotated[list[dict[str, Any]], Strictness(False), Flag(hidden=True)] = Field(
        min_length=1,
        description="Each step is a verb (structure, prune, retrain, distill, compress) with its "
        "options. A distillation learns from the chain's model unless it names a teacher.",
    )


class ChainRecipe(RemoteCode, Steps, OutputFolder, Recipe):
    """Several verbs, each on the model that the one before it made."""

    run: ClassVar[type[Section] | None] = Resuming
