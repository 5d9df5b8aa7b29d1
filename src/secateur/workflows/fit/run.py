"""`secateur fit`: a bound in, the best packed model within it out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.calibration.mix import texts_of
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
from secateur.workflows.compress.packable import PackableMatrix, find_matrices
from secateur.workflows.fit.accuracy import prepared_tasks
from secateur.workflows.fit.costs import costs_of
from secateur.workflows.fit.course import carry_out
from secateur.workflows.fit.feasible import OPTION_OF, check_feasible, in_words
from secateur.workflows.fit.files import FILES
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.pace import Pace
from secateur.workflows.fit.targets import check_target

FIT = "fit.json"


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


def opened(
    recipe: FitRecipe, progress: Progress
) -> tuple[LocalCheckpoint, CheckpointReader, dict[str, PackableMatrix]]:
    """Open the model: the checkpoint, its tensors, and the matrices that can be packed."""
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code, progress=progress)
    refuse_quantized(source.folder)
    reader = CheckpointReader(source.folder)
    return source, reader, find_matrices(reader, "int8", recipe.trust_remote_code)


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


def identity(recipe: FitRecipe, reader: CheckpointReader, progress: Progress) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        **recipe.model_dump(mode="json", exclude={"output", "memory", "minutes"}),
        "micro_batch_tokens": recipe.memory.micro_batch_tokens,
        "levels": [kind.name for kind in FILES[recipe.target].levels],
        "source_files": file_digests(reader.files, progress),
    }
