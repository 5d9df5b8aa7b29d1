"""Checks the options of a compression before any model is read."""

from __future__ import annotations

from secateur.errors import RecipeError
from secateur.recipes.compress import CompressRecipe
from secateur.registry import did_you_mean
from secateur.runtime.choice import AUTO, check_names
from secateur.runtime.formats import GRID_BITS, VALUES
from secateur.workflows.compress.rounding import check_calibration


def check_compression(recipe: CompressRecipe) -> None:
    """Check everything in a recipe that does not need its model.

    Raises:
        RecipeError: a format is unknown, or options do not fit together.
    """
    bound = recipe.max_loss_increase
    grids = [values for values in recipe.overrides.values() if values in GRID_BITS]
    check_names(recipe.format, recipe.values, None if bound or grids else recipe.group_size)
    for glob, values in recipe.overrides.items():
        if values not in VALUES:
            raise RecipeError(
                f"unknown values {values!r}",
                where=f"override {glob!r}",
                remedy=did_you_mean(values, [*VALUES]),
            )
    if bound is not None and recipe.overrides:
        raise RecipeError(
            "a bound on the loss chooses the values of all linears, but some have their own",
            where="--overrides",
            remedy="leave one of the two out",
        )
    if bound is None:
        check_calibration(recipe)
    elif recipe.values != AUTO:
        raise RecipeError(
            f"a bound on the loss chooses the values, but they are {recipe.values!r}",
            remedy="use --values auto, or leave --max-loss-increase out",
        )
    elif recipe.calibration.source is None:
        raise RecipeError(
            "a bound on the loss needs text to measure the loss on",
            remedy="add --calibration TEXT, or leave --max-loss-increase out",
        )
