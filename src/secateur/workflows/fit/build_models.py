"""Makes models whose linears are stored in given formats: a run that prunes, and one that rounds.

Both runs go through the layers in order, so every linear is fitted to the inputs that it has in the
model that is made. The same options, as steps of a chain, are the recipe of the winner.

A level is such a model with one format for all linears. All levels of one sparsity share the pruned
model. The error of a linear on a level is the sum of the squared errors of pruning and of rounding,
both relative to the squared outputs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.engine.choose.stored_levels import FitLevel, Level
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.fit import FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.choice import AUTO, choose_layout
from secateur.workflows.compress.pack import ChosenValues, pack_model, zero_fractions
from secateur.workflows.compress.rounding import (
    BITS,
    output_errors,
    refuse_renamed,
    round_checkpoint,
    rounding_recipe,
)
from secateur.workflows.compress.storage_plan import PackableMatrix, find_matrices
from secateur.workflows.fit.context import Ground
from secateur.workflows.fit.storage_formats import LevelKind
from secateur.workflows.prune.checkpoint import run_recipe

Kinds = Mapping[str, LevelKind]
"""How every linear is stored, by its name."""


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


def made(
    recipe: FitRecipe,
    source: Path,
    matrices: Mapping[str, PackableMatrix],
    kinds: Kinds,
    text: Path,
    output: Path,
    progress: Progress,
) -> tuple[Path, Path]:
    """Prune and round a model; the arguments are those of `rounded`.

    Returns:
        The folders before and after rounding.
    """
    output.mkdir(parents=True, exist_ok=True)
    sparse = pruned(recipe, source, kinds, text, output / "pruned", Labelled(progress, "pruning"))
    return sparse, rounded(
        recipe, sparse, matrices, kinds, text, output / "rounded", Labelled(progress, "rounding")
    )


def pruned(
    recipe: FitRecipe, source: Path, kinds: Kinds, text: Path, output: Path, progress: Progress
) -> Path:
    """Prune a model, unless an earlier run has or no kind has zeros. Return the folder.

    Args:
        recipe: gives effort, memory and device.
        source: the model.
        kinds: the sparsity of every linear.
        text: file of the calibration windows.
        output: folder of the result.
        progress: receives the steps.
    """
    options = prune_options(recipe, kinds, str(text))
    if options is None:
        return source
    if not output.exists():
        ends = {"model": str(source), "output": str(output), **trust(recipe)}
        run = build_recipe(PruneRecipe, {**options, **ends})
        run_recipe(run, progress, resume=True)
    return output


def rounded(
    recipe: FitRecipe,
    source: Path,
    matrices: Mapping[str, PackableMatrix],
    kinds: Kinds,
    text: Path,
    output: Path,
    progress: Progress,
) -> Path:
    """Round a model, unless an earlier run has or no kind is rounded. Return the folder.

    Args:
        recipe: gives memory and device.
        source: the model, already pruned.
        matrices: that can be packed, by stored name.
        kinds: the values of every linear.
        text: file of the calibration windows.
        output: folder of the result.
        progress: receives the steps.
    """
    options = compress_options(recipe, kinds, str(text))
    if "calibration" not in options:
        return source
    ends = {"model": str(source), "output": str(output), **trust(recipe)}
    run = build_recipe(CompressRecipe, {**options, **ends})
    zeros = zero_fractions(CheckpointReader(source), dict(matrices))
    return round_checkpoint(rounding_recipe(run, source, zeros, output), progress)


def packed(
    recipe: FitRecipe,
    source: LocalCheckpoint,
    folder: Path,
    kinds: Kinds,
    output: Path,
    progress: Progress,
) -> Path:
    """Pack a model that was made, unless an earlier run has. Return the folder.

    Args:
        recipe: the recipe.
        source: the model before rounding; gives configuration and tokenizer.
        folder: the model.
        kinds: how every linear is stored.
        output: folder of the result.
        progress: receives every tensor.
    """
    if not output.exists():
        unfinished = output.with_name(f"{output.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        chosen = chosen_values(recipe, folder, kinds)
        pack_model(unfinished, packing_recipe(recipe, kinds), source, chosen, progress)
        unfinished.rename(output)
    return output


def chosen_values(
    recipe: FitRecipe, folder: Path, kinds: Kinds, rounding: dict[str, Any] | None = None
) -> ChosenValues:
    """What is packed of a model that was made.

    Args:
        recipe: the recipe.
        folder: the model.
        kinds: how every linear is stored.
        rounding: the record of its rounding.
    """
    reader = CheckpointReader(folder)
    matrices = find_matrices(reader, "int8", recipe.trust_remote_code)
    values = {n: kinds[m.linear].values for n, m in matrices.items() if m.prunable}
    return ChosenValues(reader, matrices, values, rounding or {})


def packing_recipe(recipe: FitRecipe, kinds: Kinds) -> CompressRecipe:
    """The recipe that packs a model with these kinds."""
    options = compress_options(recipe, kinds, "")
    packing = {key: options[key] for key in ("values", "overrides", "embeddings")}
    return build_recipe(CompressRecipe, {**packing, "model": recipe.model, "output": recipe.output})


def steps_of(recipe: FitRecipe, kinds: Kinds, text: str) -> list[dict[str, Any]]:
    """The steps of a chain that make and pack a model with these kinds."""
    prune = prune_options(recipe, kinds, text)
    compress = {"compress": compress_options(recipe, kinds, text)}
    return [compress] if prune is None else [{"prune": prune}, compress]


def prune_options(recipe: FitRecipe, kinds: Kinds, text: str) -> dict[str, Any] | None:
    """The options of `prune` that give every linear its sparsity; None if there are no zeros."""
    wanted = {name: kind.sparsity for name, kind in kinds.items()}
    if not any(wanted.values()):
        return None
    same = len(set(wanted.values())) == 1
    return {
        "effort": recipe.effort,
        "sparsity": max(wanted.values()) if same else 0.0,
        "overrides": {} if same else {name: share for name, share in wanted.items() if share},
        "calibration": {"source": text},
        **shared(recipe),
    }


def compress_options(recipe: FitRecipe, kinds: Kinds, text: str) -> dict[str, Any]:
    """The options of `compress` that give every linear its values."""
    wanted = {name: kind.values for name, kind in kinds.items()}
    common = Counter(wanted.values()).most_common(1)[0][0]
    options: dict[str, Any] = {
        "values": common,
        "overrides": {name: values for name, values in wanted.items() if values != common},
        "embeddings": "int8",
    }
    if BITS.keys() & wanted.values():
        options |= {"calibration": {"source": text}, **shared(recipe)}
    return options


def shared(recipe: FitRecipe) -> dict[str, Any]:
    """The options that all runs take over."""
    memory = recipe.memory.model_dump(exclude_unset=True)
    return {"device": recipe.device, **({"memory": memory} if memory else {})}


def trust(recipe: FitRecipe) -> dict[str, bool]:
    """Whether code from the folder of the model may run; a chain says it once for all steps."""
    return {"trust_remote_code": recipe.trust_remote_code}
