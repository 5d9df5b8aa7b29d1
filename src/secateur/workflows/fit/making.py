"""Makes models whose linears are stored in given kinds: a run that prunes, and one that rounds.

Both runs go through the layers in order, so every linear is fitted to the inputs that it has in the
model that is made. The same options, as steps of a chain, are the recipe of the winner.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.fit import FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.workflows.compress.pack import ChosenValues, fractions, pack_model
from secateur.workflows.compress.packable import PackableMatrix, find_matrices
from secateur.workflows.compress.rounding import BITS, round_checkpoint, rounding_recipe
from secateur.workflows.fit.kinds import LevelKind
from secateur.workflows.prune.checkpoint import run_recipe

Kinds = Mapping[str, LevelKind]
"""How every linear is stored, by its name."""


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
    zeros = fractions(CheckpointReader(source), dict(matrices))
    return round_checkpoint(rounding_recipe(run, source, zeros, output), progress)


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
