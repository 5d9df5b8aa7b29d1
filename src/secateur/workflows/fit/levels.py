"""Makes the levels of a fit: checkpoints of one model, pruned, rounded, or both.

A level that is pruned and rounded is the pruned model, rounded with calibration text: its zeros
stay. All levels of one sparsity share the pruned model. The error of a linear on a level is the
sum of the squared errors of pruning and of rounding, both relative to the squared outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.engine.choose.fitting import FitLevel
from secateur.engine.choose.values import Level
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.fit import FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.choice import AUTO, choose_layout
from secateur.workflows.compress.mixed_values import refuse_renamed
from secateur.workflows.compress.pack import fractions
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.compress.rounding import output_errors, round_checkpoint, rounding_recipe
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import KINDS, LevelKind
from secateur.workflows.prune.checkpoint import run_recipe

__all__ = ["made_levels"]


def made_levels(ground: Ground) -> Iterator[FitLevel]:
    """Make every level, or reuse what an earlier run has made."""
    recipe, matrices, work = ground.recipe, ground.matrices, ground.work
    pruned: dict[float, Path] = {0.0: ground.reader.folder}
    for sparsity in sorted({kind.sparsity for kind in KINDS if kind.sparsity}):
        folder = work / f"pruned-{sparsity:g}"
        if not folder.exists():
            run = pruning_recipe(recipe, ground.reader.folder, sparsity, ground.fitted, folder)
            run_recipe(run, Labelled(ground.progress, f"{sparsity:.0%} zeros"), resume=True)
        pruned[sparsity] = folder
    for kind in KINDS:
        folder = pruned[kind.sparsity]
        errors = {} if kind.sparsity == 0 else output_errors(folder)
        if kind.values.startswith("int"):
            own = work / f"{kind.values}-{kind.sparsity:g}"
            zeros = fractions(CheckpointReader(folder), dict(matrices))
            run = rounding_recipe(rounding(recipe, kind, ground.fitted), folder, zeros, own)
            folder = round_checkpoint(run, Labelled(ground.progress, kind.name))
            rounded = output_errors(folder)
            errors = {name: errors.get(name, 0.0) + rounded[name] for name in rounded}
        made = CheckpointReader(folder)
        refuse_renamed(ground.stored.values(), made)
        yield FitLevel(kind.name, kind.family, Level(made, sizes_of(made, matrices, kind), errors))


def sizes_of(
    reader: CheckpointReader, matrices: Mapping[str, PackableMatrix], kind: LevelKind
) -> dict[str, int]:
    """Bytes of every linear of a level when it is packed, by its name."""
    sizes = {}
    for name, matrix in matrices.items():
        if matrix.prunable:
            stored = reader.read(name)
            weight = stored.t() if matrix.transposed else stored
            sizes[matrix.linear] = choose_layout(weight, format=AUTO, values=kind.values).nbytes
    return sizes


def shared(recipe: FitRecipe) -> dict[str, Any]:
    """The options that all runs take over."""
    return {
        "memory": recipe.memory.model_dump(exclude_unset=True),
        "device": recipe.device,
        "trust_remote_code": recipe.trust_remote_code,
    }


def pruning_recipe(
    recipe: FitRecipe, folder: Path, sparsity: float, windows: Path, output: Path
) -> PruneRecipe:
    """The recipe of a pruned level."""
    return build_recipe(
        PruneRecipe,
        {
            "model": str(folder),
            "output": str(output),
            "effort": recipe.effort,
            "sparsity": sparsity,
            "calibration": {"source": str(windows)},
            **shared(recipe),
        },
    )


def rounding(recipe: FitRecipe, kind: LevelKind, windows: Path) -> CompressRecipe:
    """The recipe that rounds to a level's values."""
    return build_recipe(
        CompressRecipe,
        {
            "model": recipe.model,
            "values": kind.values,
            "calibration": {"source": str(windows)},
            **shared(recipe),
        },
    )
