"""Packs the winner of a fit."""

from __future__ import annotations

from secateur.engine.choose.fitting import FitLevel
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.results.compress import CompressResult
from secateur.runs.folder import RunFolder
from secateur.workflows.compress.mixed_values import MixedReader
from secateur.workflows.compress.pack import ChosenValues, pack_into
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import KINDS

__all__ = ["pack_winner"]


def pack_winner(
    folder: RunFolder,
    ground: Ground,
    levels: list[FitLevel],
    level_of: dict[str, int],
    begun: float,
) -> CompressResult:
    """Pack the winner.

    Args:
        folder: of the run, opened.
        ground: of the fit.
        levels: the levels.
        level_of: the level of every linear, by its name.
        begun: when the run began, for the record.
    """
    stored = ground.stored
    readers = {stored[n]: levels[level].level.reader for n, level in level_of.items() if level}
    values = {stored[linear]: KINDS[level].values for linear, level in level_of.items()}
    recipe = build_recipe(
        CompressRecipe,
        {
            "model": ground.recipe.model, "output": ground.recipe.output, "values": "bfloat16",
            "embeddings": "int8",
        },
    )  # fmt: skip
    mixed = MixedReader(ground.reader.folder, readers)
    chosen = ChosenValues(mixed, dict(ground.matrices), values, {})
    return pack_into(folder, recipe, ground.source, chosen, ground.progress, begun)
