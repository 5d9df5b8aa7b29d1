"""Rounds a checkpoint to int8, int4 or int3 with calibration text.

This uses the pruning run, layer by layer. The zeros stay the same. Every other weight moves to the
grid of its row or group, and the weights of a row compensate each other's rounding errors. The
result is a checkpoint of the same dtype with weights on grids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.choice import DEFAULT_GROUP
from secateur.workflows.prune.checkpoint import run_recipe

__all__ = ["check_calibration", "output_errors", "round_checkpoint", "rounding_recipe", "told_of"]


BITS = {"int8": 8, "int4": 4, "int3": 3}
"""The bits of the values that can be rounded with text."""


def check_calibration(recipe: CompressRecipe) -> None:
    """Refuse calibration options that have no effect, before anything is read.

    Raises:
        RecipeError: the values are not rounded, or an option needs text and there is none.
    """
    text, values = recipe.calibration.source, recipe.values
    if text is not None and values not in BITS:
        raise RecipeError(
            f"calibration text helps to round to integers, but the values are {values!r}",
            remedy=f"add --values {', '.join(BITS)}, or leave --calibration out",
        )
    given = sorted(
        (recipe.calibration.model_fields_set - {"source"})
        | recipe.memory.model_fields_set
        | (recipe.model_fields_set & {"device"})
    )
    if text is None and given:
        raise RecipeError(
            f"{given[0]!r} is about calibration, and there is none",
            remedy="add --calibration TEXT, or leave it out",
        )


def rounding_recipe(
    recipe: CompressRecipe, folder: Path, sparsity_of: Mapping[str, float], output: Path
) -> PruneRecipe:
    """The recipe of a run that rounds to a grid and keeps the zeros of the source."""
    how = {"bits": BITS[recipe.values]}
    if recipe.values != "int8":
        how["group"] = recipe.group_size or DEFAULT_GROUP
    return build_recipe(
        PruneRecipe,
        {
            "model": str(folder),
            "output": str(output),
            "score": "kept",
            "solver": "obs",
            "method_parameters": how,
            "scope": "layer",
            "sparsity": 0.0,
            "include": tuple(sparsity_of),
            "overrides": dict(sparsity_of),
            "asymmetric": True,
            "fast_matmuls": True,
            "calibration": recipe.calibration.model_dump(exclude_unset=True),
            "memory": recipe.memory.model_dump(exclude_unset=True),
            "device": recipe.device,
            "trust_remote_code": recipe.trust_remote_code,
        },
    )


def round_checkpoint(recipe: PruneRecipe, progress: Progress) -> Path:
    """Run a rounding recipe, or resume or reuse an earlier run. Return its folder."""
    assert recipe.output is not None
    output = Path(recipe.output)
    if not output.exists():
        run_recipe(recipe, progress, resume=True)
    return output


def told_of(rounded: Path) -> dict[str, Any]:
    """The record of the rounding for the notes of the result."""
    notes = rounded / "secateur"
    manifest = json.loads((notes / "manifest.json").read_text(encoding="utf-8"))
    errors = output_errors(rounded).values()
    return {
        "solver": manifest["method"]["solver"],
        "asymmetric": manifest["method"]["asymmetric"],
        "calibration": manifest["calibration"],
        "mean_error": sum(errors) / len(errors),
        "seconds": manifest["cost"]["seconds"],
    }


def output_errors(rounded: Path) -> dict[str, float]:
    """The squared relative error of the outputs of every linear, from the notes of a run."""
    lines = (rounded / "secateur" / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    linears = [linear for line in lines for linear in json.loads(line)["linears"]]
    return {linear["name"]: linear["error"] for linear in linears}
