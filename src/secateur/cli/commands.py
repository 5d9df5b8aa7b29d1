"""What every verb does with its recipe. Nothing that takes long to import is loaded before it runs.

`secateur.cli.commands:NAME` is the command of the verb NAME. It is made when the command line
looks it up, so that only the recipe of that verb is imported. A verb that is not in the core says
in the table of verbs what does its work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import make_command
from secateur.recipes.verbs import VERBS, imported

if TYPE_CHECKING:
    from secateur.progress import Progress
    from secateur.recipes.compress import CompressRecipe, DecompressRecipe, FitRecipe
    from secateur.recipes.deploy import (
        ChatRecipe,
        ExportRecipe,
        GenerateRecipe,
        ImportRecipe,
    )
    from secateur.recipes.measure import (
        BenchRecipe,
        DiagnoseRecipe,
        EvaluateRecipe,
        InspectRecipe,
        SweepRecipe,
    )
    from secateur.recipes.prune import ChainRecipe, DemoRecipe, MethodsRecipe, PruneRecipe
    from secateur.recipes.structure import StructureRecipe
    from secateur.recipes.train import TrainRecipe
    from secateur.reporting.tables import Result

COMMANDS: dict[str, Callable[[], Callable[..., None]]] = {}
"""For each verb, a function that makes its command."""


def __getattr__(name: str) -> Callable[..., None]:
    if name in COMMANDS:
        return COMMANDS[name]()
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verb = VERBS[name]  # of a package apart from the core

    def run(recipe: Any, **call: Any) -> Result | None:
        if verb.streams:
            imported(verb.run)(recipe, **call)
            return None
        with _show_progress() as progress:
            result: Result = imported(verb.run)(recipe, progress, **call)
        return result

    return make_command(
        name, run, exit_code=lambda x: getattr(x, "exit_code", 0), streams=verb.streams
    )


def _command(verb: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the work of a verb; `how` goes to `make_command`."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[verb] = partial(make_command, verb, run, **how)
        return run

    return register


def _show_progress() -> AbstractContextManager[Progress]:
    from secateur.cli.progress import show_progress  # needs rich

    return show_progress()


@_command("prune")
def _prune(recipe: PruneRecipe, *, dry_run: bool = False, **call: Any) -> Result | None:
    from secateur.parallel.processes import joined
    from secateur.steps.processes import run_worker
    from secateur.steps.prune import plan_recipe, prune_on_ray, prune_recipe

    if dry_run:
        return plan_recipe(recipe, call)
    if recipe.cluster.ray is not None:
        return prune_on_ray(recipe, call, _show_progress)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_worker(recipe, ranks)
            return None
        with _show_progress() as progress:
            return prune_recipe(recipe, progress, ranks=ranks, **call)


@_command("structure")
def _structure(recipe: StructureRecipe, *, dry_run: bool = False, **call: Any) -> Result | None:
    from secateur.parallel.processes import joined
    from secateur.steps.structure.run import plan_structure, run_worker, structure_recipe

    if dry_run:
        return plan_structure(recipe, call)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_worker(recipe, ranks)
            return None
        with _show_progress() as progress:
            return structure_recipe(recipe, progress, ranks=ranks, **call)


@_command("train")
def _train(recipe: TrainRecipe, *, dry_run: bool = False, **call: Any) -> Result | None:
    from secateur.steps.train import plan_training, run_training

    if int(os.environ.get("RANK", "0")):
        run_training(recipe, **call)
        return None
    with _show_progress() as progress:
        if dry_run:
            return plan_training(recipe, progress, call)
        return run_training(recipe, progress, **call)


@_command("compress", exit_code=lambda result: 3 if result.broken else 0)
def _compress(recipe: CompressRecipe, **call: Any) -> Result:
    from secateur.steps.compress import Compress
    from secateur.steps.runner import carry_out

    with _show_progress() as progress:
        return carry_out(Compress, recipe, progress, **call)


def _check_fit(recipe: FitRecipe) -> None:
    from secateur.steps.fit import Fit

    Fit.check(recipe)


@_command(
    "fit",
    exit_code=lambda result: 3 if getattr(result, "broken", False) else 0,
    check=_check_fit,
)
def _fit(recipe: FitRecipe, *, dry_run: bool = False, **call: Any) -> Result:
    from secateur.steps.fit import Fit, plan_fit
    from secateur.steps.runner import carry_out

    with _show_progress() as progress:
        if dry_run:
            return plan_fit(recipe, progress, call)
        return carry_out(Fit, recipe, progress, **call)


@_command("chain")
def _chain(recipe: ChainRecipe, **call: Any) -> Result:
    from secateur.steps.chain import Chain
    from secateur.steps.runner import carry_out

    with _show_progress() as progress:
        return carry_out(Chain, recipe, progress, **call)


@_command("import")
def _import(recipe: ImportRecipe, **call: Any) -> Result:
    from secateur.steps.import_model import ImportModel
    from secateur.steps.runner import carry_out

    with _show_progress() as progress:
        return carry_out(ImportModel, recipe, progress, **call)


@_command("decompress")
def _decompress(recipe: DecompressRecipe, **call: Any) -> Result:
    from secateur.steps.runner import carry_out
    from secateur.steps.unpack import Decompress

    with _show_progress() as progress:
        return carry_out(Decompress, recipe, progress, **call)


@_command("methods")
def _methods(recipe: MethodsRecipe) -> Result:
    from secateur.steps.methods import methods

    return methods()


@_command("demo")
def _demo(recipe: DemoRecipe) -> Result:
    from secateur.steps.demo import run_demo

    with _show_progress() as progress:
        return run_demo(recipe, progress)


@_command("generate", streams=True)
def _generate(recipe: GenerateRecipe, *, as_json: bool) -> None:
    from secateur.cli.conversation import generate

    generate(recipe, as_json)


@_command("chat", streams=True)
def _chat(recipe: ChatRecipe, *, as_json: bool) -> None:
    from secateur.cli.conversation import chat

    chat(recipe, as_json)


def _check_tasks(recipe: EvaluateRecipe) -> None:
    from secateur.evaluation.task_data import check_request

    check_request(recipe.tasks, source=recipe.task_data, limit=recipe.limit, shots=recipe.shots)


@_command("evaluate", check=_check_tasks)
def _evaluate(recipe: EvaluateRecipe) -> Result | None:
    from secateur.parallel.processes import joined
    from secateur.progress import Silent
    from secateur.steps.evaluate import run_evaluation

    with joined(recipe.device) as ranks:
        if not ranks.first:
            run_evaluation(recipe, Silent(), ranks=ranks)
            return None
        with _show_progress() as progress:
            return run_evaluation(recipe, progress, ranks=ranks)


@_command(  # 1 if nothing could run
    "bench",
    exit_code=lambda result: int(all(speed.failure is not None for speed in result.speeds)),
)
def _bench(recipe: BenchRecipe) -> Result:
    from secateur.evaluation.speed import BACKENDS
    from secateur.steps.bench import bench

    options = dict(recipe)
    if recipe.contenders == ("all",):
        options["contenders"] = BACKENDS
    with _show_progress() as progress:
        result = bench(**options, progress=progress)
    for reason, failed in result.failures.items():
        print(f"{', '.join(failed)} could not run: {reason}", file=sys.stderr)
    return result


@_command("inspect")
def _inspect(recipe: InspectRecipe) -> Result:
    from secateur.steps.inspect import inspect

    with _show_progress() as progress:
        return inspect(**dict(recipe), progress=progress)


def _diagnosis_exit_code(result: Any) -> int:
    """3 if a finding is an error."""
    count = getattr(result, "count", None)
    return 3 if count and count("error") else 0


@_command("diagnose", exit_code=_diagnosis_exit_code)
def _diagnose(recipe: DiagnoseRecipe) -> Result:
    from secateur.steps.diagnose import check_target, diagnose

    if recipe.machine:
        return check_target()
    options = {key: value for key, value in recipe if key != "machine"}
    with _show_progress() as progress:
        return diagnose(**options, progress=progress)


@_command("sweep", exit_code=lambda result: int(bool(result.failures)))
def _sweep(recipe: SweepRecipe) -> Result:
    from secateur.steps.sweep import sweep_recipe

    with _show_progress() as progress:
        return sweep_recipe(recipe, progress)


@_command("export")
def _export(recipe: ExportRecipe, **call: Any) -> Result:
    from secateur.steps.export import Export
    from secateur.steps.runner import carry_out

    with _show_progress() as progress:
        return carry_out(Export, recipe, progress, **call)
