"""Refuses bounds that no model can keep, before any work, and names the nearest that one can."""

from __future__ import annotations

import math
from collections.abc import Mapping

from secateur.errors import RecipeError
from secateur.recipes.fit import FitRecipe
from secateur.workflows.fit.costs import MEMORY, SECONDS, SIZE, Costs

OPTION_OF: Mapping[str, str] = {
    SIZE: "max_size",
    MEMORY: "max_inference_memory",
    SECONDS: "decode_speedup",
}
"""The option that bounds each kind of cost."""

NEAREST: Mapping[str, str] = {
    SIZE: "the smallest possible size is",
    MEMORY: "the smallest possible memory is",
    SECONDS: "the largest speed-up by the table of timed matrices is",
}


def in_words(costs: Costs, name: str, value: float) -> str:
    """A cost as the option that bounds it takes it, rounded to the side that can be kept."""
    if name == SECONDS:
        assert costs.times is not None
        return f"{math.floor(100 * costs.times.base / value) / 100:g}"
    return f"{math.ceil(10 * value / 2**20) / 10:.1f}MiB"


def check_feasible(recipe: FitRecipe, costs: Costs, source: int) -> None:
    """Refuse a bound that no level can keep, and bounds that cannot be kept together.

    Args:
        recipe: gives the bounds.
        costs: of the model.
        source: bytes of the model's weight files.

    Raises:
        RecipeError: names the nearest bound that is possible.
    """
    bounded = [n for n, kind in enumerate(costs.kinds) if math.isfinite(kind.limit)]
    for alone in (True, False):
        for place in bounded:
            least = costs.least(place, alone=alone)
            if least is None or least > costs.kinds[place].limit:
                raise impossible(recipe, costs, place, least, alone=alone)
    if bounded == [0] and recipe.max_loss_increase is None and costs.kinds[0].limit >= source:
        least = costs.least(0)
        assert least is not None
        raise RecipeError(
            f"the model has {source / 2**20:.1f}MiB, so it fits into {recipe.max_size} as it is",
            where="--max-size",
            remedy=f"leave it, or give a size from {in_words(costs, SIZE, least)} on",
        )


def impossible(
    recipe: FitRecipe, costs: Costs, place: int, least: float | None, *, alone: bool
) -> RecipeError:
    """The error for a bound that cannot be kept; `least` is the smallest cost that can."""
    name = costs.kinds[place].name
    bounds = [OPTION_OF[kind.name] for kind in costs.kinds if math.isfinite(kind.limit)]
    others = " and ".join(option for option in bounds if option != OPTION_OF[name])
    if least is None:
        return RecipeError(
            f"no model keeps {others} together", where=OPTION_OF[name], remedy="leave one out"
        )
    beside = "" if alone else f" with this {others}"
    wanted = getattr(recipe, OPTION_OF[name])
    said = {
        SIZE: f"no level fits into {wanted}",
        MEMORY: f"no level runs in {wanted} with {recipe.context_length} tokens of context",
        SECONDS: f"no level decodes {wanted} times as fast as dense int8 on this machine",
    }[name]
    nearest = f"{NEAREST[name]} {in_words(costs, name, least)}"
    return RecipeError(
        said + beside,
        where=OPTION_OF[name],
        remedy=f"{nearest}; or cut the model first with `secateur structure`",
    )
