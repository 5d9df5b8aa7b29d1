"""Rounds a checkpoint to int8, int4 or int3 with calibration text.

This uses the pruning run, layer by layer. The zeros stay the same. Every other weight moves to the
grid of its row or group, and the weights of a row compensate each other's rounding errors. The
result is a checkpoint of the same dtype with weights on grids.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.engine.prune.tasks import last_match, refuse_idle_globs
from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.choice import DEFAULT_GROUP
from secateur.workflows.prune.checkpoint import run_recipe

BITS = {"int8": 8, "int4": 4, "int3": 3}
"""The bits of the values that can be rounded with text."""


def check_calibration(recipe: CompressRecipe) -> None:
    """Refuse calibration text that has no effect, before anything is read.

    Raises:
        RecipeError: the values are not rounded.
    """
    text, values = recipe.calibration.source, [recipe.values, *recipe.overrides.values()]
    if text is not None and not BITS.keys() & values:
        raise RecipeError(
            f"calibration text helps to round to integers, but the values are {recipe.values!r}",
            remedy=f"add --values {', '.join(BITS)}, or leave --calibration out",
        )


def rounding_recipe(
    recipe: CompressRecipe, folder: Path, sparsity_of: Mapping[str, float], output: Path
) -> PruneRecipe:
    """The recipe of a run that rounds to grids and keeps the zeros of the source.

    Args:
        recipe: gives the values of every linear, the text and the device.
        folder: the source.
        sparsity_of: the fraction of zeros of every linear, by its name.
        output: of the run.
    """
    own = own_values(recipe, sparsity_of)
    how = {n: parameters(recipe, v) for n, v in own.items() if v in BITS}
    common = parameters(recipe, Counter(v for v in own.values() if v in BITS).most_common(1)[0][0])
    return build_recipe(
        PruneRecipe,
        {
            "model": str(folder),
            "output": str(output),
            "score": "kept",
            "solver": "obs",
            "method_parameters": common,
            "method_overrides": {name: one for name, one in how.items() if one != common},
            "scope": "layer",
            "sparsity": 0.0,
            "include": tuple(how),
            "overrides": {name: sparsity_of[name] for name in how},
            "asymmetric": True,
            "fast_matmuls": True,
            "calibration": recipe.calibration.model_dump(exclude_unset=True),
            "memory": recipe.memory.model_dump(exclude_unset=True),
            "device": recipe.device,
            "trust_remote_code": recipe.trust_remote_code,
        },
    )


def own_values(recipe: CompressRecipe, linears: Iterable[str]) -> dict[str, str]:
    """The values of every linear, by its name.

    Raises:
        RecipeError: an override matches no linear.
    """
    names = list(linears)
    refuse_idle_globs(recipe.overrides, names)
    return {name: last_match(recipe.overrides, name) or recipe.values for name in names}


def parameters(recipe: CompressRecipe, values: str) -> dict[str, int]:
    """The parameters of the solver that rounds to these values."""
    group = {} if values == "int8" else {"group": recipe.group_size or DEFAULT_GROUP}
    return {"bits": BITS[values], **group}


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
