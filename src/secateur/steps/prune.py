"""`secateur prune`: prunes a checkpoint or a loaded model, and can pack the result.

Several processes can share the work. When all is ready, the first one sends the others what only it
knows. They open the same source, take the calibration windows from the work folder, and prune layer
by layer together with the first process. They write only their own hidden states. When the layers
are pruned they end, and the first one goes on alone: distillation takes one window a step, so there
is nothing to share.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.run_windows import WINDOWS
from secateur.diagnostics.audit import Audit, audit_checkpoint, verify
from secateur.engine.plan import explained
from secateur.engine.plan_memory import store_choice, stored_choice
from secateur.engine.plan_time import estimate_seconds
from secateur.engine.prepared import Prepared, allocated, choose_plan, prepare
from secateur.engine.prune.coverage import coverage, reach
from secateur.engine.prune.run import prune_layers
from secateur.engine.prune.tasks import Settings, Tasks, settled_allocation, skipped_matrices
from secateur.errors import RecipeError
from secateur.models.block_files import BlockFiles
from secateur.models.opening import formats_of
from secateur.models.targets import refuse_all_zero
from secateur.parallel.ranks import Ranks, refuse_another_disk, refuse_another_model
from secateur.progress import Progress, Silent, listener
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.methods_of import allocation_of, method_of, own_methods, with_method
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import texts_of
from secateur.recipes.verbs import VERBS, imported
from secateur.reporting.cards import prune_card
from secateur.reporting.models import CompressResult, PruneResult
from secateur.reporting.plan import PlanResult
from secateur.runs import records
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES, STATE, RunFolder, check_output, file_digests
from secateur.runs.ledger import Ledger
from secateur.runs.output import write_json, write_text
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import Method
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.steps.runner import COMPRESSION, RunContext, Step, identity_of, judge_of, source_of

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
MANY_MORE = 0.005
"""A run warns where more weights than this share are zero beyond its sparsity."""

LEDGER, MANIFEST = "layers.jsonl", "manifest.json"

NO_PART = {"output", "compress", "memory", "on_collapse", "processes"}
"""Fields of a recipe that do not affect the pruned weights."""


@takes_options_of(PruneRecipe)
def prune(
    model: str | Path | nn.Module,
    *,
    method: str | Method | None = None,
    calibration: str | Path | Iterable[str] | Tensor | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult | PlanResult:
    """Prune a model: a checkpoint into a new folder, or a loaded module in place.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        method: A method by name (`secateur methods` lists them), or what `compose` returned.
        calibration: Calibration text, as a file, folder, hub data set or named text, or as several
            texts; for a loaded model also token windows [windows, sequence_length]. [c4, or
            the text that a sample brings]
        tokenizer: of a loaded model, to read text. [the one at the place the model came from]
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The result of the run; with `dry_run` its plan.

    Raises:
        SecateurError: what, where, and what to do.
    """
    options = with_method(method, options)
    if isinstance(model, nn.Module):
        from secateur.steps.loaded_model import prune_module

        return prune_module(model, calibration, tokenizer, listener(progress), options)
    if tokenizer is not None:
        raise RecipeError(
            "`tokenizer` is for loaded models; a checkpoint has its own",
            remedy="leave it out, or load the model and prune it",
        )
    if options.get("output") is None and not options.get("dry_run"):
        raise RecipeError("`output` is missing: the folder for the pruned model")
    if isinstance(calibration, Tensor):
        raise RecipeError(
            "token windows as a tensor are for loaded models",
            remedy="save them with secateur.calibration.windows.save_windows and pass the file",
        )
    own = {"model": model, "calibration": calibration}
    recipe, call = recipe_of(PruneRecipe, own, options)
    showing: Any = partial(nullcontext, listener(progress))
    result: PruneResult | PlanResult = VERBS["prune"].run(recipe, call, showing)
    return result


class Prune(Step[PruneRecipe, PruneResult]):
    """Prunes a checkpoint into a new folder."""

    verb = "prune"

    def __init__(self, prepared: Prepared, run: RunContext) -> None:
        super().__init__(prepared.recipe, run)
        self.prepared, self.tasks = prepared, prepared.tasks()
        folder = run.folder
        sweep_windows = stored_choice(folder.work) if folder.state else None
        self.plan, self.activations = choose_plan(
            prepared, self.tasks, prepared.recipe.memory, run.ranks, sweep_windows
        )
        self.ledger = Ledger(folder.notes / LEDGER)
        folder.worth_resuming = lambda: bool(self.ledger.entries)

    @classmethod
    def alone(cls, recipe: PruneRecipe) -> str:
        """Several processes do not compress."""
        return "" if recipe.compress is None else "--compress"

    @classmethod
    def check(cls, recipe: PruneRecipe) -> Any:
        """Check the parts of the method."""
        method, _ = method_of(recipe)
        own_methods(recipe)
        allocation_of(recipe, method)
        choose_device(recipe.device)
        return None if recipe.compress is None else _and_compress().check(recipe)

    @classmethod
    def reads(cls, recipe: PruneRecipe) -> Iterable[str]:
        """The calibration text, and the teacher."""
        return [*texts_of(recipe.calibration.source), *filter(None, [recipe.distillation.teacher])]

    @classmethod
    def open(cls, recipe: PruneRecipe, run: RunContext) -> Step[PruneRecipe, PruneResult]:
        """Open everything that a recipe names, with the windows of a stopped run if any."""
        if recipe.compress is not None:
            both: Step[PruneRecipe, PruneResult] = _and_compress()(recipe, run)
            return both
        folder = run.folder
        kept = folder.notes if folder.finished else folder.work
        windows = kept / WINDOWS if folder.state else None
        prepared = prepare(recipe, run.source, folder.model, windows, progress=run.progress)
        return cls(prepared, run)

    @property
    def disk_bytes(self) -> int:
        """The pruned copy, and what the work stores."""
        return self.plan.disk_bytes

    def identity(self) -> dict[str, Any]:
        """Everything that affects the pruned weights."""
        prepared, progress = self.prepared, self.run.progress
        teacher = prepared.teacher and prepared.teacher.reader.files
        return {
            **identity_of(self.recipe, NO_PART, prepared.target.reader.files, progress),
            "starts": dict(prepared.selection.starts),
            "methods": {glob: repr(method) for glob, method in prepared.methods.items()},
            **({"teacher_files": file_digests(teacher, progress)} if teacher else {}),
        }

    def work(self) -> PruneResult:
        """Prune layer by layer, let the model recover, and count its zeros again."""
        folder, progress, ranks = self.run.folder, self.run.progress, self.run.ranks
        target, ledger, recipe = self.prepared.target, self.ledger, self.recipe
        if not folder.resumed:
            refuse_all_zero(target)
        prepared = self.prepared
        if prepared.windows is not None:
            windows = prepared.windows.complete(
                folder.work,
                self.run.source.folder,
                target.device,
                recipe.calibration.seed,
                progress,
            )
            prepared = replace(prepared, windows=windows)
        store_choice(folder.work, self.plan.sweep_windows)
        finished = 0
        if ledger.begun:
            finished = ledger.resume()
        else:
            assert target.output is not None
            target.output.create(progress)
            ledger.begin()
        # what the other processes cannot find out by themselves
        of_others = {
            "partial": str(folder.partial),
            "state": folder.state_text(),
            "windows": None if prepared.windows is None else str(folder.work / WINDOWS),
            "activations": self.activations,
            "experts_at_once": self.plan.experts_at_once,
            "done": finished,
            "entries": ledger.entries,
            "source": target.reader.tensor_digest,
        }
        ranks.once(lambda: of_others)
        at_once = self.plan.experts_at_once
        settings = Settings.of(recipe, self.activations, folder.work, ranks, at_once)
        stream = prepared.stream(settings)
        # a resumed run draws what the stopped one would have drawn
        with torch.random.fork_rng(devices=[]), explained(self.plan):
            torch.manual_seed(recipe.calibration.seed)
            how = prepared.allocation, prepared.sparsity
            tasks = allocated(target, self.tasks, stream, settings, *how, progress)
            done = prune_layers(target, tasks, stream, settings, ledger, progress, finished)
            losses = self._distill(prepared, done)
        left = skipped_matrices(done, target.matrices())  # with those that no token reached
        # before the audit, which sees the zeros alone
        reached = reach(ledger.layers, (name for name, task in done.items() if task.changes))
        audit = _audit(recipe, done, folder, progress)
        manifest = self._manifest(prepared, reached, audit, losses, left)
        _write_notes(manifest, prepared, self.run)
        return self.result(folder.model, self.run.place)

    def _distill(self, prepared: Prepared, done: Tasks) -> dict[str, Any] | None:
        """Let the pruned model learn from the dense one; None if it does not."""
        how, run = self.recipe.distillation, self.run
        if prepared.windows is None or not how.epochs:
            return None
        # a run that does not learn needs no training
        from secateur.training.distillation import DistillationData
        from secateur.training.distilled_checkpoint import distill_checkpoint

        on_grid = any(task.rounded and task.method.solver.grid for task in done.values())
        on_grid |= bool(BlockFiles(run.folder.model).places)
        data = DistillationData(
            prepared.windows.all, how, self.recipe.calibration.seed, on_grid=on_grid
        )
        losses = distill_checkpoint(
            prepared.teacher or prepared.target,
            run.folder.model,
            done,
            data,
            self.plan.sweep_windows,
            run.folder.work,
            run.progress,
        )
        if losses is None:
            return None
        teacher = how.teacher or self.run.source.record.name
        return {**losses, "teacher": teacher, "tokens": data.steps * data.windows.shape[1]}

    @classmethod
    def share(cls, recipe: PruneRecipe, ranks: Ranks) -> None:
        """Prune the share of a process that is not the first.

        Raises:
            RecipeError: this process sees other files than the first one.
        """
        source = source_of(recipe, Silent(), ranks)
        job = ranks.once(lambda: None)
        if job is None:  # an earlier run has finished everything
            return
        place = Path(job["partial"])
        try:
            same = (place / STATE).read_text(encoding="utf-8") == job["state"]
        except OSError:
            same = False
        if not same:
            refuse_another_disk(ranks.rank, place)
        stored = job["windows"] and Path(job["windows"])
        prepared = prepare(recipe, source, stored_windows=stored)
        if prepared.target.reader.tensor_digest != job["source"]:
            refuse_another_model(ranks.rank, prepared.source.folder)
        ledger = Ledger()
        ledger.entries = job["entries"]
        target, progress = prepared.target, Silent()
        work, at_once = place / "work", job["experts_at_once"]
        settings = Settings.of(recipe, job["activations"], work, ranks, at_once)
        stream = prepared.stream(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.calibration.seed)
            how = prepared.allocation, prepared.sparsity
            tasks = allocated(target, prepared.tasks(), stream, settings, *how, progress)
            prune_layers(target, tasks, stream, settings, ledger, progress, job["done"])

    @classmethod
    def result(cls, output: Path, place: Path | None = None) -> PruneResult:
        """Read the result of a finished run from its notes, with its compression if it has one.

        Args:
            output: the folder of the result.
            place: the folder that the result names, if it is another one.
        """
        ledger = Ledger(output / NOTES / LEDGER)
        ledger.resume()
        manifest = records.read_record(records.Manifest, output / NOTES / MANIFEST)
        packed, file = None, output / NOTES / COMPRESSION
        if file.is_file():
            packed = records.read_record(CompressResult, file).model_copy(
                update={"output": place or output}
            )
        sparsity, left = manifest.result.decoder_sparsity, list(manifest.left)
        return PruneResult(
            sparsity=sparsity,
            layers=ledger.layers,
            manifest=manifest,
            output=place or output,
            left=left,
            compression=packed,
        )

    def _manifest(
        self,
        prepared: Prepared,
        reached: dict[str, int | None],
        audit: Audit,
        losses: dict[str, Any] | None,
        left: Sequence[records.SkippedMatrix],
    ) -> records.Manifest:
        """The record of a finished run."""
        method, recipe, windows = prepared.method, self.recipe, prepared.windows
        folder, layers = self.run.folder, self.ledger.layers
        cost = {
            **self.run.meter.read(),
            "resumed": folder.resumed,
            "processes": self.run.ranks.count,
        }
        return records.Manifest(
            manifest_version=records.MANIFEST_VERSION,
            source=prepared.source.record,
            formats=formats_of(prepared.source.folder, folder.model),
            family=audit.family,
            method={
                "name": method.name,
                "score": scores.describe(method.score),
                "solver": solvers.describe(method.solver),
                "pattern": method.pattern.name,
                "scope": method.pattern.scope,
                "refinement": refinements.describe(method.refinement)
                if method.refinement
                else None,
                "effort": recipe.effort,
                "sequential": recipe.sequential,
                "asymmetric": recipe.asymmetric,
                "fast_matmuls": recipe.fast_matmuls,
                "reconstruction": recipe.reconstruction.model_dump(),
                "distillation": recipe.distillation.model_dump(),
                "asked_sparsity": prepared.sparsity,
            },
            allocation=_describe_allocation(prepared, folder.work),
            calibration=windows and windows.record,
            calibration_digest=windows and windows.digest,
            environment=environment(prepared.target.device),
            plan={**self.plan.to_json(), "activations": self.activations},
            cost=records.Cost.model_validate(cost),
            result=audit.result,
            distillation=losses,
            experts=coverage(layers, prepared.target.architecture),
            reach=reached,
            left=tuple(left),
            collapsed=tuple(name for layer in layers for name in layer.collapsed),
        )


def _audit(recipe: PruneRecipe, tasks: Tasks, folder: RunFolder, progress: Progress) -> Audit:
    """Read the pruned model again, and compare its zeros with the tasks."""
    audit = audit_checkpoint(
        folder.model,
        lambda name: tasks[name].method.pattern,
        {name: task.sparsity for name, task in tasks.items()},
        progress=progress,
    )
    verify(audit)
    found = (x for x in audit.linears if x.name in tasks)
    pruned = [x for x in found if tasks[x.name].method.score_name != "kept"]
    weights = sum(x.weights for x in pruned)
    asked = sum(tasks[x.name].sparsity * x.weights for x in pruned)
    zeros = sum(x.zeros for x in pruned)
    if zeros > asked + MANY_MORE * weights:
        log.warning(
            "the decoder has %.1f %% zeros, and the target is %.1f %%: it had them before, and "
            "pruning fills none",
            100 * zeros / weights,
            100 * asked / weights,
        )
    return audit


def _describe_allocation(prepared: Prepared, work: Path) -> dict[str, Any]:
    """The allocation, the range of its sparsities, and the measurements of a search."""
    record = {
        "name": prepared.recipe.allocation,
        "parameters": allocations.describe(prepared.allocation),
    }
    settled = settled_allocation(work)
    if not settled.exists():
        return record
    found = json.loads(settled.read_text(encoding="utf-8"))
    shares = found.pop("sparsity_of").values()
    return {**record, "lowest_sparsity": min(shares), "highest_sparsity": max(shares), **found}


def _write_notes(manifest: records.Manifest, prepared: Prepared, run: RunContext) -> None:
    """Write recipe, manifest, windows and card into the result."""
    folder, recipe = run.folder, prepared.recipe
    if prepared.windows is not None:
        shutil.copyfile(folder.work / WINDOWS, folder.notes / WINDOWS)
    write_text(folder.notes / RECIPE, dump_recipe(recipe))
    write_json(folder.notes / MANIFEST, manifest.to_json())
    source, place = prepared.source.folder, recipe.output or folder.output
    write_text(folder.model / "README.md", prune_card(manifest, run.again(recipe), source, place))


def _and_compress() -> Any:
    """The step of a recipe that also compresses, which few do."""
    return imported("secateur.steps.chain:PruneAndCompress")


def plan_recipe(recipe: PruneRecipe, progress: Progress, call: Mapping[str, Any]) -> PlanResult:
    """Check a recipe, and show what it would need on this machine.

    Args:
        recipe: recipe of the pruning.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    if recipe.compress is not None:
        _and_compress().check(recipe)
    judge_of(recipe)
    plan = plan_pruning(recipe, progress, recipe.processes or 1)
    read = recipe.model, *texts_of(recipe.calibration.source)
    check_output(recipe.output, "prune", plan.plan.disk_bytes, read, call)
    return plan


def plan_pruning(recipe: PruneRecipe, progress: Progress, processes: int = 1) -> PlanResult:
    """What a recipe would need on this machine: its first process, if it has several."""
    prepared = prepare(recipe, source_of(recipe, progress), only_plan=True)
    tasks = prepared.tasks()
    ranks = Ranks(0, processes, processes)
    plan, activations = choose_plan(prepared, tasks, recipe.memory, ranks)
    settings = Settings.of(recipe, activations)
    seconds = estimate_seconds(prepared, tasks, settings, plan.passed_tokens)
    left = skipped_matrices(tasks, prepared.target.matrices())
    plan = replace(plan, left=left, seconds=seconds)
    return PlanResult(plan=plan, activations=activations, processes=processes)
