"""Calibration windows with pictures: where they come from, and what cannot use them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from secateur.calibration.statistics import of_gradients
from secateur.calibration.windows import Beside, load_beside
from secateur.errors import RecipeError
from secateur.parallel.ranks import Ranks
from secateur.recipes.prune import PruneRecipe
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.methods import Method

BESIDE = "beside.safetensors"
"""Of a stopped run, next to its windows."""


def beside_of(
    recipe: PruneRecipe,
    method: Method,
    allocation: Allocation,
    windows: Tensor,
    stored: Path | None,
) -> Beside | None:
    """What the calibration windows of a recipe have beside their tokens; None if nothing.

    Args:
        recipe: the recipe.
        method: of the recipe.
        allocation: of the recipe.
        windows: the windows.
        stored: the windows of a stopped run, or of the first process; None for those of the recipe.

    Raises:
        RecipeError: a step of the recipe would read the windows without their pictures.
        SourceError: the tensors do not fit the windows.
    """
    file = stored.with_name(BESIDE) if stored else Path(recipe.calibration.source).expanduser()
    if file.suffix != ".safetensors" or not file.exists():
        return None
    beside = load_beside(file, len(windows))
    if beside is None:
        return None
    without = {
        "the gradients of this method": of_gradients(method.requires | allocation.requires),
        f"the allocation {recipe.allocation}": recipe.allocation != "uniform",
        "distillation": recipe.distillation.epochs,
        "--generated-windows": recipe.calibration.generated_windows,
    }
    reader = next((name for name, used in without.items() if used), None)
    if reader is not None:
        raise RecipeError(
            f"{reader} would read the windows without {', '.join(sorted(beside.tensors))}",
            where=str(file),
            remedy="leave it out, or calibrate on text",
        )
    return beside


def refuse_shared(beside: Beside | None, ranks: Ranks) -> None:
    """Refuse pictures in several processes.

    Raises:
        RecipeError: there are pictures, and several processes.
    """
    if beside is not None and ranks.count > 1:
        raise RecipeError(
            f"{ranks.count} processes cannot share windows with pictures",
            remedy="run one process, or calibrate on text",
        )
