"""Rounding a checkpoint to int8 with the help of calibration text.

The run that prunes, layer by layer, with another question: the zeros are those that are there,
and every weight that stays moves to the grid of its row and makes up for the rounding of those
before it. The result is a checkpoint of the same dtype whose weights lie on int8 grids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.recipes.reading import SECTIONS, build_recipe, nested
from secateur.recipes.schema import PruneRecipe
from secateur.registry import did_you_mean
from secateur.workflows.prune.checkpoint import run_recipe

__all__ = ["check_options", "round_checkpoint", "told_of"]

OPTIONS = SECTIONS["calibration"] - {"generated"} | SECTIONS["memory"] | {"device"}
"""What of a recipe can be said of rounding."""
NAMED = {"archive", "calibration", "embeddings", "format", "values"}
"""What else can be said of a compression."""


def check_options(calibration: str | None, values: str, options: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
        RecipeError: an option is unknown, or there is no use for it.
    """
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise RecipeError(
            f"compress has no option {unknown[0]!r}",
            remedy=did_you_mean(unknown[0], sorted(OPTIONS | NAMED)),
        )
    if calibration is not None and values != "int8":
        raise RecipeError(
            f"calibration text helps to round to int8, and the values are to be {values!r}",
            remedy="add --values int8, or leave --calibration out",
        )
    given = [name for name, value in options.items() if value is not None]
    if calibration is None and given:
        raise RecipeError(
            f"{given[0]!r} is about calibration, and there is none",
            remedy="add --calibration TEXT, or leave it out",
        )


def rounding_recipe(
    folder: Path, sparsity_of: Mapping[str, float], output: Path, calibration: str, **options: Any
) -> PruneRecipe:
    """The recipe whose result lies on int8 grids, with the zeros that the source has."""
    values = nested({key: value for key, value in options.items() if value is not None})
    values.setdefault("calibration", {})["source"] = calibration
    return build_recipe(
        {
            "model": str(folder),
            "output": str(output),
            "score": "kept",
            "solver": "obs",
            "parameters": {"bits": 8},
            "scope": "layer",
            "sparsity": 0.0,
            "include": tuple(sparsity_of),
            "overrides": dict(sparsity_of),
            "asymmetric": True,
            "fast_matmuls": True,
            **values,
        }
    )


def round_checkpoint(recipe: PruneRecipe, progress: Progress) -> Path:
    """Carry a rounding recipe out, as far as an earlier run has not; returns the folder."""
    assert recipe.output is not None
    output = Path(recipe.output)
    if not output.exists():
        run_recipe(recipe, progress, resume=True)
    return output


def told_of(rounded: Path) -> dict[str, Any]:
    """What the notes of the result say about how it was rounded."""
    notes = rounded / "secateur"
    manifest = json.loads((notes / "manifest.json").read_text(encoding="utf-8"))
    lines = (notes / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    errors = [linear["error"] for line in lines for linear in json.loads(line)["linears"]]
    return {
        "solver": manifest["method"]["solver"],
        "asymmetric": manifest["method"]["asymmetric"],
        "calibration": manifest["calibration"],
        "mean_error": sum(errors) / len(errors),
        "seconds": manifest["cost"]["seconds"],
    }
