"""Rounds a checkpoint to int8, int4 or int3 with calibration text.

This uses the pruning run, layer by layer. The zeros stay the same. Every other weight moves to the
grid of its row or group, and the weights of a row compensate each other's rounding errors. The
result is a checkpoint of the same dtype with weights on grids.

Within a bound on the loss (`MixedChoice`), the checkpoint is rounded as a whole to int8 and to
int4, by the same runs as `--values int8` and `--values int4`. Then each linear takes its weights
from the source or from one of the two (`engine/search/stored_levels.py`). A sixth of the
calibration windows, which the rounding does not see, measures the loss of candidates and of the
packed model; another sixth measures that of the result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.calibration.run_windows import WindowReader
from secateur.engine.prune.tasks import last_match, refuse_idle_globs
from secateur.engine.search.stored_levels import Level, choose_levels
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError
from secateur.evaluation.perplexity import LossComparison
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runs.environment import choose_device
from secateur.runs.records import Manifest, read_record
from secateur.runtime.choice import DEFAULT_GROUP, choose_layout, values_for
from secateur.steps.compress.storage_plan import ChosenValues, PackableMatrix, settled_values
from secateur.steps.prune import Prune
from secateur.steps.runner import carry_out

BITS = {"int8": 8, "int4": 4, "int3": 3}
"""The bits of the values that can be rounded with text."""

ROUNDED = ("int8", "int4")
"""The values to choose from besides those of the source, from the largest."""


def round_checkpoint(
    recipe: CompressRecipe,
    source: Path,
    sparsity_of: Mapping[str, float],
    output: Path,
    progress: Progress,
) -> Path:
    """Round to grids and keep the zeros of the source. Resume or reuse an earlier run.

    Args:
        recipe: gives the values of every linear, the text and the device.
        source: the checkpoint.
        sparsity_of: the fraction of zeros of every linear, by its name.
        output: folder of the run.
        progress: receives every step.

    Returns:
        The folder of the run.
    """
    own = own_values(recipe, sparsity_of)
    how = {n: _parameters(recipe, v) for n, v in own.items() if v in BITS}
    common = _parameters(recipe, Counter(v for v in own.values() if v in BITS).most_common(1)[0][0])
    run = build_recipe(
        PruneRecipe,
        {
            "model": str(source),
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
    if not output.exists():
        carry_out(Prune, run, progress, resume=True)
    return output


def own_values(recipe: CompressRecipe, linears: Iterable[str]) -> dict[str, str]:
    """The values of every linear, by its name.

    Raises:
        RecipeError: an override matches no linear.
    """
    names = list(linears)
    refuse_idle_globs(recipe.overrides, names)
    return {name: last_match(recipe.overrides, name) or recipe.values for name in names}


def _parameters(recipe: CompressRecipe, values: str) -> dict[str, int]:
    """The parameters of the solver that rounds to these values."""
    group = {} if values == "int8" else {"group": recipe.group_size or DEFAULT_GROUP}
    return {"bits": BITS[values], **group}


def rounding_record(rounded: Path) -> dict[str, Any]:
    """The record of the rounding for the notes of the result."""
    notes = rounded / "secateur"
    manifest = read_record(Manifest, notes / "manifest.json")
    errors = output_errors(rounded).values()
    return {
        "solver": manifest.method["solver"],
        "asymmetric": manifest.method["asymmetric"],
        "calibration": manifest.calibration,
        "mean_error": sum(errors) / len(errors),
        "seconds": manifest.cost.seconds,
    }


def output_errors(rounded: Path) -> dict[str, float]:
    """The squared relative error of the outputs of every linear, from the notes of a run."""
    lines = (rounded / "secateur" / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    linears = [linear for line in lines for linear in json.loads(line)["linears"]]
    return {linear["name"]: linear["error"] for linear in linears}


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


class MixedChoice:
    """A checkpoint that was rounded as a whole, ready to choose the values of each linear.

    Args:
        recipe: with `max_loss_increase` and a calibration text.
        reader: the source.
        matrices: that can be packed, by stored name.
        zeros: the fraction of zeros of every linear, by its name.
        work: folder for the windows, the rounded checkpoints and the measured losses.
        progress: receives every step.

    Attributes:
        choosing: measures packed folders on the windows that choose.
        judging: measures them on windows that neither rounded nor chose.
    """

    def __init__(
        self,
        recipe: CompressRecipe,
        reader: CheckpointReader,
        matrices: dict[str, PackableMatrix],
        zeros: Mapping[str, float],
        work: Path,
        progress: Progress,
    ) -> None:
        self.reader, self.matrices = reader, matrices
        self.work, self.progress = work, progress
        device, trust = choose_device(recipe.device), recipe.trust_remote_code
        self.target = CheckpointTarget(reader, None, device, trust_remote_code=trust)
        text = recipe.calibration
        assert text.source is not None
        fitted, chosen, judged = (
            work / f"{name}.safetensors" for name in ("fitted", "chosen", "judged")
        )
        config = self.target.model.config
        WindowReader.of_folder(reader.folder, config, trust_remote_code=trust).save_parts(
            text.source,
            text,
            [fitted, chosen, judged],
            "fit the rounding, choose the values and judge the result",
            progress,
        )
        self.choosing, self.judging = (
            LossComparison(self.target, file, progress, trust_remote_code=trust)
            for file in (chosen, judged)
        )
        self.linears = {m.linear: name for name, m in matrices.items() if m.prunable}
        self.folders = {}
        for values in ROUNDED:
            own = {
                "values": values,
                "group_size": recipe.group_size if values == "int4" else None,
                "calibration": text.model_copy(update={"source": str(fitted)}),
            }
            self.folders[values] = round_checkpoint(
                recipe.model_copy(update=own),
                reader.folder,
                zeros,
                work / f"rounded-{values}",
                Labelled(progress, f"rounding to {values}"),
            )
        sizes = _sizes_of(recipe, reader, matrices)
        self.levels = [Level(reader, sizes[""], {})]
        for values, folder in self.folders.items():
            rounded = CheckpointReader(folder)
            refuse_renamed(self.linears.values(), rounded)
            errors = output_errors(folder)
            self.levels.append(Level(rounded, sizes[values], errors, rounds_inputs=True))

    def within(self, bound: float) -> ChosenValues:
        """The values of each linear, with a rise of the loss of at most `bound` by the search."""
        windows, file = self.choosing.windows, self.work / "values.jsonl"
        chosen = choose_levels(self.target, self.levels, windows, bound, file, self.progress)
        names = {self.linears[linear]: n for linear, n in chosen.level_of.items() if n}
        record = rounding_record(self.folders[ROUNDED[-1]])
        errors = [self.levels[n].error_of.get(name, 0.0) for name, n in chosen.level_of.items()]
        record["mean_error"] = sum(errors) / len(errors)
        count = Counter(("unchanged", *ROUNDED)[level] for level in chosen.level_of.values())
        record["chosen"] = {
            "searched_loss_increase": chosen.loss - chosen.source_loss,
            "uniform_loss_increase": {
                values: loss - chosen.source_loss
                for values, loss in zip(ROUNDED, chosen.uniform_loss[1:], strict=True)
            },
            "matrices": dict(count),
        }
        return ChosenValues(
            MixedReader(self.reader.folder, {n: self.levels[x].reader for n, x in names.items()}),
            self.matrices,
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


def _sizes_of(
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
