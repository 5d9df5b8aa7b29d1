"""Chooses the values of each matrix within a bound on the loss.

The checkpoint is rounded as a whole to int8 and to int4, by the same runs as `--values int8` and
`--values int4`. Then each linear takes its weights from the source or from one of the two
(`engine.choose.values`). The loss is measured on a quarter of the calibration windows, which the
rounding does not see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibration.windows import load_windows
from secateur.engine.choose.values import Level, choose_levels
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe
from secateur.runtime.choice import choose_layout, values_for
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.compress.rounding import (
    output_errors,
    round_checkpoint,
    rounding_recipe,
    told_of,
)
from secateur.workflows.compress.storage_plan import settled_values
from secateur.workflows.compress.window_parts import save_parts
from secateur.workflows.prune.prepare import choose_device

__all__ = ["MixedReader", "MixedValues", "choose_values", "refuse_renamed"]

ROUNDED = ("int8", "int4")
"""The values to choose from besides those of the source, from the largest."""

JUDGED_SHARE = 4
"""One calibration window in so many measures the loss."""


@dataclass(frozen=True)
class MixedValues:
    """The result of the choice.

    Attributes:
        reader: reads every tensor from the checkpoint that it was chosen from.
        values_of: the values of each linear that is rounded, by stored name.
        record: for the notes of the result.
    """

    reader: CheckpointReader
    values_of: Mapping[str, str]
    record: dict[str, Any]


class MixedReader(CheckpointReader):
    """A checkpoint some of whose tensors are read from other folders.

    Args:
        folder: the checkpoint.
        others: the readers of these tensors, by stored name; dtypes and shapes are the same.
    """

    def __init__(self, folder: Path, others: Mapping[str, CheckpointReader]) -> None:
        super().__init__(folder)
        self.others = others

    def read(self, name: str) -> Tensor:
        """One tensor, from the folder that it was chosen from."""
        return self.others[name].read(name) if name in self.others else super().read(name)


def choose_values(
    recipe: CompressRecipe,
    reader: CheckpointReader,
    matrices: Mapping[str, PackableMatrix],
    zeros: Mapping[str, float],
    work: Path,
    progress: Progress,
) -> MixedValues:
    """Round the checkpoint, and choose the values of each linear.

    Args:
        recipe: with `max_loss_increase` and a calibration text.
        reader: the source.
        matrices: that can be packed, by stored name.
        zeros: the fraction of zeros of every linear, by its name.
        work: folder for the windows, the rounded checkpoints and the measured losses.
        progress: receives every step.
    """
    assert recipe.max_loss_increase is not None
    device = choose_device(recipe.device)
    target = CheckpointTarget(reader, None, device, trust_remote_code=recipe.trust_remote_code)
    fitted, judged = split_windows(recipe, target, work, progress)
    linears = {matrix.linear: name for name, matrix in matrices.items() if matrix.prunable}
    folders = {}
    for values in ROUNDED:
        own = with_values(recipe, values, fitted)
        run = rounding_recipe(own, reader.folder, zeros, work / f"rounded-{values}")
        folders[values] = round_checkpoint(run, Labelled(progress, f"rounding to {values}"))
    readers = {values: CheckpointReader(folder) for values, folder in folders.items()}
    for rounded in readers.values():
        refuse_renamed(linears.values(), rounded)
    sizes = sizes_of(recipe, reader, matrices)
    levels = [Level(reader, sizes[""], {})]
    levels += [Level(readers[v], sizes[v], output_errors(folders[v])) for v in ROUNDED]
    chosen = choose_levels(
        target, levels, judged, recipe.max_loss_increase, work / "values.jsonl", progress
    )
    names = {linears[linear]: level for linear, level in chosen.level_of.items() if level}
    record = told_of(folders[ROUNDED[-1]])
    record["mean_error"] = sum(
        levels[level].error_of.get(linear, 0.0) for linear, level in chosen.level_of.items()
    ) / len(chosen.level_of)
    count = Counter(("unchanged", *ROUNDED)[level] for level in chosen.level_of.values())
    record["chosen"] = {
        "max_loss_increase": recipe.max_loss_increase,
        "loss_increase": chosen.loss - chosen.source_loss,
        "uniform_loss_increase": {
            values: loss - chosen.source_loss
            for values, loss in zip(ROUNDED, chosen.uniform_loss[1:], strict=True)
        },
        "judged_tokens": judged.numel(),
        "matrices": dict(count),
    }
    return MixedValues(
        MixedReader(reader.folder, {n: levels[level].reader for n, level in names.items()}),
        {name: ROUNDED[level - 1] for name, level in names.items()},
        record,
    )


def refuse_renamed(names: Iterable[str], rounded: CheckpointReader) -> None:
    """Refuse a model whose rounded copy stores its matrices under other names.

    Raises:
        ArchitectureError: names one of them.
    """
    missing = next((name for name in names if name not in rounded.entries), None)
    if missing is not None:
        raise ArchitectureError(
            f"the rounded copy does not store {missing!r} under this name, so values cannot be "
            "chosen for each matrix",
            where=str(rounded.folder),
            remedy="choose the values yourself: --values int8 or --values int4",
        )


def with_values(recipe: CompressRecipe, values: str, windows: Path) -> CompressRecipe:
    """The recipe that rounds to these values on ready windows."""
    text = recipe.calibration.model_copy(update={"source": str(windows)})
    group = recipe.group_size if values == "int4" else None
    return recipe.model_copy(update={"values": values, "group_size": group, "calibration": text})


def split_windows(
    recipe: CompressRecipe, target: CheckpointTarget, work: Path, progress: Progress
) -> tuple[Path, Tensor]:
    """The file of the windows for the rounding, and the windows that measure the loss.

    Raises:
        RecipeError: there is only one window.
    """
    files = [work / "fitted.safetensors", work / "judged.safetensors"]
    text = recipe.calibration.source
    assert text is not None
    save_parts(
        text, recipe.calibration, target, files, JUDGED_SHARE,
        "both fit the rounding and measure the loss", progress,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
    return files[0], load_windows(files[1])


def sizes_of(
    recipe: CompressRecipe, reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]
) -> dict[str, dict[str, int]]:
    """The size in bytes of every linear, by values ("" for those of the source) and name."""
    base = settled_values(reader, dict(matrices), recipe.values)
    sizes: dict[str, dict[str, int]] = {values: {} for values in ("", *ROUNDED)}
    for name, matrix in matrices.items():
        if not matrix.prunable:
            continue
        stored = reader.read(name)
        for values, found in sizes.items():
            choice = choose_layout(
                stored.t() if matrix.transposed else stored,
                format=recipe.format,
                values=values_for(stored.dtype, values or base, name),
                transposed=matrix.transposed,
                group=recipe.group_size,
            )
            found[matrix.linear] = choice.nbytes
    return sizes
