"""Makes the levels of a fit: checkpoints of one model, pruned, rounded, or both.

A level that is pruned and rounded is the pruned model, rounded with calibration text: its zeros
stay. All levels of one sparsity share the pruned model. The error of a linear on a level is
√(pruning² + rounding²), both relative to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.engine.choose.fitting import FitLevel
from secateur.engine.choose.values import Level
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.fit import FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.choice import AUTO, DEFAULT_GROUP, choose_layout
from secateur.runtime.formats import GRID_BITS, Layout, formats
from secateur.workflows.compress.mixed_values import refuse_renamed
from secateur.workflows.compress.pack import fractions
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.compress.rounding import output_errors, round_checkpoint, rounding_recipe
from secateur.workflows.prune.checkpoint import run_recipe

__all__ = ["KINDS", "LevelKind", "least_bytes", "made_levels"]


@dataclass(frozen=True)
class LevelKind:
    """How a level stores linears.

    Attributes:
        values: such as `int4`.
        sparsity: the fraction of zeros.
    """

    values: str
    sparsity: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sparsity:.0%} zeros, {self.values}" if self.sparsity else self.values

    @property
    def family(self) -> str:
        """Which techniques it uses."""
        rounded = self.values.startswith("int")
        return "both" if rounded and self.sparsity else "quantize" if rounded else "prune"


KINDS = (
    LevelKind("bfloat16", 0.0),
    LevelKind("int8", 0.0),
    LevelKind("int4", 0.0),
    LevelKind("int3", 0.0),
    *(LevelKind(values, 0.5) for values in ("bfloat16", "int8", "int4", "int3")),
    *(LevelKind(values, 0.7) for values in ("bfloat16", "int4")),
)
"""The levels; the first is the model itself."""


def size_of(shape: tuple[int, int], kind: LevelKind) -> int:
    """Bytes of a matrix on a level: the smaller one of bitmask and dense."""
    group = DEFAULT_GROUP if kind.values in GRID_BITS else None
    nonzeros = round(shape[0] * shape[1] * (1 - kind.sparsity))
    names = ("dense", "bitmask") if kind.sparsity else ("dense",)
    layouts = [Layout(name, kind.values, shape, group=group) for name in names]
    return min(formats[layout.format].nbytes(layout, nonzeros) for layout in layouts)


def made_levels(
    recipe: FitRecipe,
    reader: CheckpointReader,
    matrices: Mapping[str, PackableMatrix],
    windows: Path,
    work: Path,
    progress: Progress,
) -> Iterator[FitLevel]:
    """Make every level, or reuse what an earlier run has made.

    Args:
        recipe: gives effort, memory and device.
        reader: the dense model.
        matrices: that can be packed, by stored name.
        windows: file of the calibration windows.
        work: folder for the checkpoints.
        progress: receives every step.
    """
    linears = {m.linear: name for name, m in matrices.items() if m.prunable}
    pruned: dict[float, Path] = {0.0: reader.folder}
    for sparsity in sorted({kind.sparsity for kind in KINDS if kind.sparsity}):
        folder = work / f"pruned-{sparsity:g}"
        if not folder.exists():
            run = pruning_recipe(recipe, reader.folder, sparsity, windows, folder)
            run_recipe(run, Labelled(progress, f"{sparsity:.0%} zeros"), resume=True)
        pruned[sparsity] = folder
    for kind in KINDS:
        folder = pruned[kind.sparsity]
        errors = {} if kind.sparsity == 0 else output_errors(folder)
        if kind.values.startswith("int"):
            own = work / f"{kind.values}-{kind.sparsity:g}"
            zeros = fractions(CheckpointReader(folder), dict(matrices))
            run = rounding_recipe(rounding(recipe, kind, windows), folder, zeros, own)
            folder = round_checkpoint(run, Labelled(progress, kind.name))
            rounded = output_errors(folder)
            errors = {n: (errors.get(n, 0.0) ** 2 + rounded[n] ** 2) ** 0.5 for n in rounded}
        made = CheckpointReader(folder)
        refuse_renamed(linears.values(), made)
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


def as_seen(reader: CheckpointReader, name: str, matrix: PackableMatrix) -> tuple[int, int]:
    """The shape [out, in] of a stored matrix."""
    first, second = reader.entries[name].shape
    return (second, first) if matrix.transposed else (first, second)


def least_bytes(reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]) -> int:
    """The smallest size of all linears that the levels allow, by arithmetic."""
    shapes = [as_seen(reader, n, m) for n, m in matrices.items() if m.prunable]
    return sum(min(size_of(shape, kind) for kind in KINDS) for shape in shapes)


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
