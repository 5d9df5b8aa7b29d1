"""Checks the options of a compression before any model is read."""

from __future__ import annotations

from secateur.recipes.compress import CompressRecipe
from secateur.runtime.choice import check_names
from secateur.workflows.compress.rounding import check_calibration

__all__ = ["check_compression"]


def check_compression(recipe: CompressRecipe) -> None:
    """Check everything in a recipe that does not need its model.

    Raises:
        RecipeError: a format is unknown, or options do not fit together.
    """
    check_names(recipe.format, recipe.values, recipe.group_size)
    check_calibration(recipe)
