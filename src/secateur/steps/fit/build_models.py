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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.engine.search.stored_levels import Level
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe, FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.storage_plan import ChosenValues, Matrices, find_matrices, linear_bytes
from secateur.steps.compress import (
    BITS,
    output_errors,
    pack_model,
    refuse_renamed,
    round_checkpoint,
    zero_fractions,
)
from secateur.steps.fit.context import FitContext
from secateur.steps.fit.storage_formats import StorageFormat
from secateur.steps.prune import Prune
from secateur.steps.runner import carry_out

Formats = Mapping[str, StorageFormat]
"""How every linear is stored, by its name."""


def make_levels(context: FitContext) -> Iterator[Level]:
    """Make every level, or reuse what an earlier run has made."""
    dense, work = context.source.folder, context.work
    for level in context.costs.levels:
        formats = dict.fromkeys(context.stored, level)
        label = Labelled(context.progress, f"{level.sparsity:.0%} zeros")
        with context.time.phase("prune"):
            sparse = _prune(context, dense, formats, work / f"pruned-{level.sparsity:g}", label)
        label = Labelled(context.progress, level.name)
        output = work / f"{level.values}-{level.sparsity:g}"
        with context.time.phase("round"):
            folder = _round(context, sparse, context.matrices, formats, output, label)
        reader = CheckpointReader(folder)
        refuse_renamed(context.stored.values(), reader)
        errors: dict[str, float] = {}
        for made in sorted({sparse, folder} - {dense}):
            for name, error in output_errors(made).items():
                errors[name] = errors.get(name, 0.0) + error
        sizes = bytes_of_linears(reader, context.matrices, formats)
        yield Level(level.name, reader, sizes, errors, level.rounds_inputs, level.family)


def bytes_of_linears(
    reader: CheckpointReader, matrices: Matrices, formats: Formats
) -> dict[str, int]:
    """Bytes of every linear when it is packed, by its name."""
    sizes = linear_bytes(reader, matrices, lambda name: [formats[name].values])
    return {name: size for name, (size,) in sizes.items()}


def make_model(
    context: FitContext,
    source: Path,
    matrices: Matrices,
    formats: Formats,
    output: Path,
    progress: Progress,
) -> tuple[Path, Path]:
    """Prune and round a model, unless an earlier run has.

    Args:
        context: of the fit.
        source: the model.
        matrices: of it.
        formats: of every linear.
        output: folder of the results.
        progress: receives the steps.

    Returns:
        The folders before and after rounding: the source itself where nothing is pruned or rounded.
    """
    output.mkdir(parents=True, exist_ok=True)
    pruning, rounding = Labelled(progress, "pruning"), Labelled(progress, "rounding")
    sparse = _prune(context, source, formats, output / "pruned", pruning)
    return sparse, _round(context, sparse, matrices, formats, output / "rounded", rounding)


def _prune(
    context: FitContext, source: Path, formats: Formats, output: Path, progress: Progress
) -> Path:
    options = _prune_options(context.recipe, formats, str(context.calibration_file))
    if options is None:
        return source
    if not output.exists():
        recipe = build_recipe(PruneRecipe, {**options, **paths(context.recipe, source, output)})
        carry_out(Prune, recipe, progress, resume=True)
    return output


def _round(
    context: FitContext,
    source: Path,
    matrices: Matrices,
    formats: Formats,
    output: Path,
    progress: Progress,
) -> Path:
    options = _compress_options(context.recipe, formats, str(context.calibration_file))
    if "calibration" not in options:
        return source
    recipe = build_recipe(CompressRecipe, {**options, **paths(context.recipe, source, output)})
    zeros = zero_fractions(CheckpointReader(source), matrices)
    return round_checkpoint(recipe, source, zeros, output, progress)


def pack_made(
    context: FitContext, sparse: Path, folder: Path, formats: Formats, output: Path
) -> None:
    """Pack a model that was made, unless an earlier run has.

    Args:
        context: of the fit.
        sparse: the model before rounding; gives configuration and tokenizer.
        folder: the model.
        formats: of every linear.
        output: folder of the result.
    """
    if output.exists():
        return
    unfinished = output.with_name(f"{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    chosen = chosen_values(context.recipe, folder, formats)
    source = replace(context.source, folder=sparse)
    recipe = packing_recipe(context.recipe, formats)
    pack_model(unfinished, recipe, source, chosen, context.progress)
    unfinished.rename(output)


def chosen_values(
    recipe: FitRecipe, folder: Path, formats: Formats, rounding: dict[str, Any] | None = None
) -> ChosenValues:
    """What is packed of a model that was made; `rounding` is the record of its rounding."""
    reader = CheckpointReader(folder)
    matrices = find_matrices(reader, "int8", recipe.trust_remote_code)
    values = {n: formats[m.linear].values for n, m in matrices.items() if m.prunable}
    return ChosenValues(reader, matrices, values, rounding or {})


def packing_recipe(recipe: FitRecipe, formats: Formats) -> CompressRecipe:
    """The recipe that packs a model with these formats."""
    options = _compress_options(recipe, formats, "")
    packing = {key: options[key] for key in ("values", "overrides", "embeddings")}
    return build_recipe(CompressRecipe, {**packing, "model": recipe.model, "output": recipe.output})


def chain_steps(recipe: FitRecipe, formats: Formats, text: str) -> list[dict[str, Any]]:
    """The steps of a chain that make and pack a model with these formats."""
    prune = _prune_options(recipe, formats, text)
    compress = {"compress": _compress_options(recipe, formats, text)}
    return [compress] if prune is None else [{"prune": prune}, compress]


def _prune_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any] | None:
    """The options of `prune` that give every linear its sparsity; None if there are no zeros."""
    wanted = {name: stored.sparsity for name, stored in formats.items()}
    if not any(wanted.values()):
        return None
    same = len(set(wanted.values())) == 1
    return {
        "effort": recipe.effort,
        "sparsity": max(wanted.values()) if same else 0.0,
        "overrides": {} if same else {name: share for name, share in wanted.items() if share},
        "calibration": {"source": text},
        **shared_options(recipe),
    }


def _compress_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any]:
    """The options of `compress` that give every linear its values."""
    wanted = {name: stored.values for name, stored in formats.items()}
    common = Counter(wanted.values()).most_common(1)[0][0]
    options: dict[str, Any] = {
        "values": common,
        "overrides": {name: values for name, values in wanted.items() if values != common},
        "embeddings": "int8",
    }
    if BITS.keys() & wanted.values():
        options |= {"calibration": {"source": text}, **shared_options(recipe)}
    return options


def shared_options(recipe: FitRecipe) -> dict[str, Any]:
    """The options that all runs take over."""
    memory = recipe.memory.model_dump(exclude_unset=True)
    return {"device": recipe.device, **({"memory": memory} if memory else {})}


def paths(recipe: FitRecipe, source: Path, output: Path) -> dict[str, Any]:
    """The options of a run that a chain gives once for all steps."""
    trust = recipe.trust_remote_code
    return {"model": str(source), "output": str(output), "trust_remote_code": trust}
