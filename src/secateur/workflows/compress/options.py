"""The options of a compression, checked before any model is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.runtime.choice import AUTO, check_names
from secateur.workflows.compress.rounding import check_options, rounding_recipe

__all__ = ["check_compression"]


def check_compression(
    format: str = AUTO,
    values: str = AUTO,
    embeddings: str = AUTO,
    archive: bool = False,
    calibration: str | None = None,
    **options: Any,
) -> None:
    """Check the options of `compress` without looking at a model.

    Raises:
        RecipeError: one is unknown, or has a value that it cannot have.
    """
    check_names(format, values)
    if embeddings not in (AUTO, "int8"):
        raise RecipeError(f"embeddings cannot be {embeddings!r}", remedy="use 'auto' or 'int8'")
    if type(archive) is not bool:
        raise RecipeError(f"archive is {archive!r}, not true or false", remedy="use true or false")
    check_options(calibration, values, options)
    if calibration is not None:
        rounding_recipe(Path("model"), {}, Path("output"), calibration, **options)
