"""`secateur fit`: a bound in, the best packed model within it out.

| target                   | what a fit does                                                   |
|--------------------------|-------------------------------------------------------------------|
| cpu                      | all levels: our formats and kernels, timed on this machine        |
| any                      | all levels, no bound on time or memory: these belong to an engine |
| llama.cpp                | what a GGUF file holds; bounds on size and loss                   |
| vllm, transformers, h100 | refused, with what does the work instead                          |
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.calibration.documents import texts_of
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.progress import Progress, listener
from secateur.recipes.fit import FitRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.reporting.plots import save_plots
from secateur.reporting.results.fit import FitResult
from secateur.reporting.results.plan import FitPlanResult
from secateur.runs.atomic import write_json
from secateur.runs.folder import RunFolder, check_output, file_digests
from secateur.workflows.compress.storage_plan import PackableMatrix, find_matrices
from secateur.workflows.fit.context import Ground, Pace
from secateur.workflows.fit.costs import OPTION_OF, check_feasible, costs_of, in_words
from secateur.workflows.fit.evaluation import prepared_tasks
from secateur.workflows.fit.pipeline import carry_out
from secateur.workflows.fit.storage_formats import FILES

FIT = "fit.json"


OF_AN_ENGINE = ("max_inference_memory", "decode_speedup")
"""Bounds that mean nothing without an engine."""


INSTEAD: Mapping[str, tuple[str, str]] = {
    "vllm": (
        "vLLM reads one scheme for all linears from compressed-tensors, w8a8 or w4a16, and gains "
        "nothing from zeros, so there is no mix to search",
        "secateur export MODEL --to compressed-tensors --type w8a8 or w4a16 makes both candidates",
    ),
    "transformers": (
        "transformers stores and multiplies dense bfloat16, so only cuts make a model smaller or "
        "faster there",
        "secateur structure MODEL --params or --layers makes them",
    ),
    "h100": (
        "2:4 zeros and fp8 are not measured here, and a fit predicts from measurements",
        "secateur advise MODEL --hardware h100-80gb gives published and estimated numbers",
    ),
}
"""Why there is no fit for a target, and what to do."""


@takes_options_of(FitRecipe)
def fit(
    model: str | Path, *, progress: Progress | None = None, **options: Any
) -> FitResult | FitPlanResult:
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4 or 3 bits, be pruned to 50 or 70 %, or both.
    A search measured on the whole model chooses, and the winner is packed.

    Args:
        model: folder, hub id, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The winner, the frontier, and what each single technique gives; with `dry_run` the plan.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(FitRecipe, {"model": model}, options)
    if call.pop("dry_run", False):
        return plan_fit(recipe, listener(progress), call)
    return fit_recipe(recipe, listener(progress), **call)


def plan_fit(recipe: FitRecipe, progress: Progress, call: Mapping[str, Any]) -> FitPlanResult:
    """Check a recipe and whether its bounds can be kept, and show what the fit would do.

    Args:
        recipe: recipe of the fit.
        progress: receives the matrices that are timed for a bound on speed.
        call: the other options of the call.

    Raises:
        SecateurError: as the fit would.
    """
    check_target(recipe)
    prepared_tasks(recipe)
    source, reader, matrices = opened(recipe, progress)
    costs = costs_of(recipe, reader, matrices, progress)
    size = sum(file.stat().st_size for file in reader.files)
    check_feasible(recipe, costs, size)
    read = [recipe.model, str(source.folder), *texts_of(recipe.calibration.source)]
    check_output(recipe.output, "fit", 0, read, call)
    bounds = {}
    for place, kind in enumerate(costs.kinds):
        least = costs.least(place, alone=True)
        if math.isfinite(kind.limit) and least is not None:
            name = OPTION_OF[kind.name]
            bounds[name] = f"{getattr(recipe, name)}", in_words(costs, kind.name, least)
    for name in ("max_loss_increase", "min_accuracy_kept"):
        if getattr(recipe, name) is not None:
            bounds[name] = f"{getattr(recipe, name)}", ""
    return FitPlanResult(
        linears=len(costs.shapes),
        file_bytes=size,
        bounds=bounds,
        levels=tuple(level.name for level in costs.levels),
        generations=recipe.generations,
        offspring=recipe.offspring,
        minutes=recipe.minutes,
    )


def fit_recipe(
    recipe: FitRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Carry out a recipe into a new folder.

    Args:
        recipe: the recipe.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
    """
    begun = time.perf_counter()
    check_target(recipe)
    tasks = prepared_tasks(recipe)
    folder = RunFolder(recipe.output, "fit", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model, *texts_of(recipe.calibration.source))
    source, reader, matrices = opened(recipe, progress)
    folder.keep_apart(source.folder)
    with folder:
        folder.begin(identity(recipe, reader, progress))
        if folder.finished:
            return FitResult.read(folder.notes / FIT)
        costs = costs_of(recipe, reader, matrices, progress)
        check_feasible(recipe, costs, sum(file.stat().st_size for file in reader.files))
        pace = Pace(recipe.minutes, folder.work / "pace.json", begun)
        ground = Ground.prepared(
            recipe, source, reader, matrices, costs, pace, folder.work, progress
        )
        result = carry_out(ground, folder, tasks, begun)
        write_json(folder.notes / FIT, result.to_json())
        save_plots([result.chart()], folder.notes / "frontier")
        folder.finish()
    return result


def opened(
    recipe: FitRecipe, progress: Progress
) -> tuple[LocalCheckpoint, CheckpointReader, dict[str, PackableMatrix]]:
    """Open the model: the checkpoint, its tensors, and the matrices that can be packed."""
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code, progress=progress)
    refuse_quantized(source.folder)
    reader = CheckpointReader(source.folder)
    return source, reader, find_matrices(reader, "int8", recipe.trust_remote_code)


def identity(recipe: FitRecipe, reader: CheckpointReader, progress: Progress) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        **recipe.model_dump(mode="json", exclude={"output", "memory", "minutes"}),
        "micro_batch_tokens": recipe.memory.micro_batch_tokens,
        "levels": [kind.name for kind in FILES[recipe.target].levels],
        "source_files": file_digests(reader.files, progress),
    }


def check_target(recipe: FitRecipe) -> None:
    """Refuse a target that a fit cannot serve.

    Raises:
        RecipeError: why, and what can be done.
    """
    if recipe.target in INSTEAD:
        why, remedy = INSTEAD[recipe.target]
        raise RecipeError(f"no fit for {recipe.target}: {why}", where="--target", remedy=remedy)
    bounded = [name for name in OF_AN_ENGINE if getattr(recipe, name) is not None]
    if recipe.target != "cpu" and bounded:
        raise RecipeError(
            f"{bounded[0]} needs times and memory of an engine, and only those of cpu are measured "
            f"here; the target is {recipe.target}",
            where="--target",
            remedy="give --target cpu, or bounds on size and loss",
        )
