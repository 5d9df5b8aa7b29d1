"""Makes the levels of a fit: checkpoints of one model, pruned, rounded, or both.

A level that is pruned and rounded is the pruned model, rounded with calibration text: its zeros
stay. All levels of one sparsity share the pruned model. The error of a linear on a level is the
sum of the squared errors of pruning and of rounding, both relative to the squared outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from secateur.engine.choose.fitting import FitLevel
from secateur.engine.choose.values import Level
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.runtime.choice import AUTO, choose_layout
from secateur.workflows.compress.mixed_values import refuse_renamed
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.compress.rounding import output_errors
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.making import Kinds, pruned, rounded


def made_levels(ground: Ground) -> Iterator[FitLevel]:
    """Make every level, or reuse what an earlier run has made."""
    dense = ground.reader.folder
    for kind in ground.costs.levels:
        kinds = dict.fromkeys(ground.stored, kind)
        sparse = ground.work / f"pruned-{kind.sparsity:g}"
        progress = Labelled(ground.progress, f"{kind.sparsity:.0%} zeros")
        with ground.pace.phase("prune"):
            sparse = pruned(ground.recipe, dense, kinds, ground.fitted, sparse, progress)
        with ground.pace.phase("round"):
            folder = rounded(
                ground.recipe,
                sparse,
                ground.matrices,
                kinds,
                ground.fitted,
                ground.work / f"{kind.values}-{kind.sparsity:g}",
                Labelled(ground.progress, kind.name),
            )
        reader = CheckpointReader(folder)
        refuse_renamed(ground.stored.values(), reader)
        errors = errors_of(sorted({sparse, folder} - {dense}))
        sizes = linear_bytes(reader, ground.matrices, kinds)
        level = Level(reader, sizes, errors, rounds_inputs=kind.rounds_inputs)
        yield FitLevel(kind.name, kind.family, level)


def errors_of(folders: Iterable[Path]) -> dict[str, float]:
    """The errors of every linear that some runs made, added up."""
    total: dict[str, float] = {}
    for folder in folders:
        for name, error in output_errors(folder).items():
            total[name] = total.get(name, 0.0) + error
    return total


def linear_bytes(
    reader: CheckpointReader, matrices: Mapping[str, PackableMatrix], kinds: Kinds
) -> dict[str, int]:
    """Bytes of every linear when it is packed, by its name."""
    sizes = {}
    for name, matrix in matrices.items():
        if matrix.prunable:
            stored = reader.read(name)
            weight = stored.t() if matrix.transposed else stored
            values = kinds[matrix.linear].values
            sizes[matrix.linear] = choose_layout(weight, format=AUTO, values=values).nbytes
    return sizes
