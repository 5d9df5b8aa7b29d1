"""Prunes a checkpoint into a verified folder, and plans such a run."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.documents import texts_of
from secateur.calibration.run_windows import WINDOWS
from secateur.diagnostics.audit import Audit, audit_checkpoint, verify
from secateur.engine.plan import explained
from secateur.engine.plan_time import foretell_seconds, layer_times
from secateur.engine.prune.coverage import coverage, reach
from secateur.engine.prune.group_pruning import refuse_all_zero
from secateur.engine.prune.tasks import Tasks, skipped_matrices
from secateur.engine.search.allocation import settled_allocation
from secateur.models.experts import open_experts
from secateur.models.opening import formats_of, load_whole
from secateur.parallel.ranks import ALONE, Ranks
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import dump_recipe
from secateur.reporting.cards import prune_card
from secateur.reporting.models import PruneResult
from secateur.reporting.plan import PlanResult
from secateur.runs.atomic import write_json, write_text
from secateur.runs.environment import Meter, environment
from secateur.runs.folder import NOTES, RunFolder, file_digests
from secateur.runs.ledger import Ledger
from secateur.runs.output import check_free
from secateur.runs.records import MANIFEST_VERSION, Cost, Manifest, RunResult, read_record
from secateur.sparsity.allocation import allocations
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.steps.prune.prepare import (
    Prepared,
    choose_plan,
    prepare,
    settings_of,
)
from secateur.steps.prune.workers import WorkerJob, broadcast, refuse_cluster
from secateur.training.distillation import (
    FINAL,
    DistillationData,
    Student,
    once,
    pruned_layers,
    write_layers,
)
from secateur.training.layerwise import LayerwiseDistillation

LEDGER, MANIFEST = "layers.jsonl", "manifest.json"
DISTILLATION_MODE = "distillation.json"
"""The file with the number of windows in a sweep of the distillation."""

NO_PART = {"output", "compress", "memory", "on_collapse", "cluster"}
"""Fields of a recipe that do not affect the pruned weights."""


def plan_pruning(recipe: PruneRecipe) -> PlanResult:
    """What a recipe would need on this machine."""
    began = time.perf_counter()
    prepared = prepare(recipe, only_plan=True, pictures=True)
    ready = time.perf_counter() - began
    tasks, target, windows = prepared.tasks(), prepared.target, prepared.windows
    plan, activations = choose_plan(prepared, tasks, recipe.memory)
    settings = settings_of(recipe, activations, None)
    shared_inputs = [
        tuple(f"{target.architecture.layer_name(index)}.{name}" for name in group)
        for index, layout in enumerate(prepared.layouts)
        for group in layout.groups
    ]
    seconds = foretell_seconds(
        tasks,
        [(name,) for name in tasks] if windows is None else shared_inputs,
        layer_times(target, None if windows is None else windows.planned, settings),
        ready=ready,
        passed=plan.passed_tokens,
        output_bytes=prepared.output_bytes,
        tokens=plan.calibration_tokens,
        settings=settings,
        device=target.device,
    )
    left = skipped_matrices(tasks, target.matrices())
    return PlanResult(replace(plan, left=left, seconds=seconds), activations)


def run_recipe(
    recipe: PruneRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Prune a checkpoint into a new folder.

    Args:
        recipe: the recipe.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
        ranks: the processes that share the work; this one is the first (`workers.py`).
    """
    refuse_cluster(recipe)
    meter = Meter.start()
    folder = RunFolder(recipe.output, "prune", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model, *texts_of(recipe.calibration.source))
    kept = folder.notes if folder.finished else folder.work
    windows = kept / WINDOWS if folder.state else None
    prepared = prepare(recipe, folder.model, windows, pictures=True, progress=progress)
    if prepared.windows is not None:
        prepared.windows.refuse_several(ranks.count)
    return run_prepared(prepared, folder, progress, meter, ranks)


def run_prepared(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress,
    meter: Meter,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Carry out a prepared recipe in a folder that no other run uses."""
    folder.keep_apart(prepared.source.folder)
    tasks = prepared.tasks()
    mode, sweep_windows = folder.work / DISTILLATION_MODE, None
    if folder.state and mode.exists():  # a resumed run keeps its mode, whatever fits now
        sweep_windows = json.loads(mode.read_text(encoding="utf-8"))["sweep_windows"]
    plan, activations = choose_plan(prepared, tasks, prepared.recipe.memory, ranks, sweep_windows)
    if not folder.finished:
        check_free(plan.disk_bytes, folder.output, folder.partial)
    ledger = Ledger(folder.notes / LEDGER)
    folder.worth_resuming = lambda: bool(ledger.entries)
    with folder:
        folder.begin(_identity(prepared, progress))
        if folder.finished:
            broadcast(None, ranks)
            return report_of(folder.output)
        if not folder.resumed:
            refuse_all_zero(prepared.target)
        if prepared.windows is not None:
            windows = prepared.windows.complete(
                folder.work,
                prepared.source.folder,
                prepared.target.device,
                prepared.recipe.calibration.seed,
                progress,
                trust_remote_code=prepared.recipe.trust_remote_code,
            )
            prepared = replace(prepared, windows=windows)
        write_json(mode, {"sweep_windows": plan.sweep_windows})
        job = prepared.job(tasks, activations, folder.work, ranks)
        finished = 0
        if ledger.begun:
            finished = ledger.resume()
        else:
            assert prepared.target.output is not None
            prepared.target.output.create(progress)
            ledger.begin()
        broadcast(WorkerJob.of(prepared, folder, activations, finished, ledger), ranks)
        with torch.random.fork_rng(devices=[]), explained(plan):
            torch.manual_seed(prepared.recipe.calibration.seed)
            done = job.run(ledger, progress, finished)
            losses = _distill(prepared, done, folder, plan.sweep_windows, progress)
        reached = reach(ledger.layers, (name for name, task in done.items() if task.changes))
        left = skipped_matrices(done, prepared.target.matrices())
        audit = _audit(prepared.recipe, done, folder, progress)
        found = coverage(ledger.layers, prepared.target.architecture)
        cost = {**meter.read(), "resumed": folder.resumed, "processes": ranks.count}
        manifest = _manifest(
            prepared,
            folder,
            audit,
            plan={**plan.to_json(), "activations": activations},
            cost=Cost.model_validate(cost),
            distillation=losses,
            experts=found and found.to_json(),
            reach=reached.to_json(),
            left=tuple(left),
            collapsed=tuple(name for layer in ledger.layers for name in layer.collapsed),
        )
        _write_notes(manifest, prepared, folder)
        folder.finish()
    return PruneResult(audit.sparsity, ledger.layers, manifest, folder.output, left)


def _distill(
    prepared: Prepared,
    tasks: Tasks,
    folder: RunFolder,
    sweep_windows: int,
    progress: Progress,
) -> dict[str, float] | None:
    """Let the pruned model learn from the dense one. Return the losses, or None if it does not.

    With `sweep_windows` one layer is in memory, else both whole models. All trained weights are in
    a complete file before the first layer is overwritten. So a resumed run either trains the pruned
    model again or writes the trained weights. It never mixes the two.
    """
    recipe, dense = prepared.recipe, prepared.target
    how, layers = recipe.distillation, pruned_layers(dense, tasks)
    if not how.epochs or not layers:
        return None
    saved, device, trust = folder.work / "distillation", dense.device, recipe.trust_remote_code
    assert prepared.windows is not None
    data = DistillationData.of(prepared.windows.all, how, recipe.calibration.seed)
    if sweep_windows:
        return LayerwiseDistillation(
            dense,
            folder.model,
            layers,
            lambda module, number: Student.of(module, dense, tasks, [number]),
            data,
            sweep_windows,
            saved,
            progress,
            trust_remote_code=trust,
        ).learn_into(dense)

    def learn() -> dict[str, float]:
        teacher = load_whole(
            prepared.source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
        )
        model = load_whole(folder.model, device, trust_remote_code=trust)
        open_experts(model)  # its parameters get the names in the skeleton
        student = Student.of(model, dense, tasks, layers)
        return student.learn(teacher, data, progress, saved)

    losses = once(saved, learn)
    write_layers(saved / FINAL, dense, layers)
    return losses


def _audit(recipe: PruneRecipe, tasks: Tasks, folder: RunFolder, progress: Progress) -> Audit:
    """Read the pruned model again, and compare its zeros with the tasks."""
    audit = audit_checkpoint(
        folder.model,
        lambda name: tasks[name].method.pattern,
        {name: task.sparsity for name, task in tasks.items()},
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
    )
    verify(audit)
    return audit


def report_of(output: Path) -> PruneResult:
    """Read the result of a finished run from its notes."""
    ledger = Ledger(output / NOTES / LEDGER)
    ledger.resume()
    manifest = read_record(Manifest, output / NOTES / MANIFEST)
    sparsity, left = manifest.result.decoder_sparsity, list(manifest.left)
    return PruneResult(sparsity, ledger.layers, manifest, output, left)


def _identity(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """Everything that affects the pruned weights."""
    recipe = prepared.recipe.model_dump(mode="json", exclude=NO_PART)
    return {
        **recipe,
        "micro_batch_tokens": prepared.recipe.memory.micro_batch_tokens,
        "starts": dict(prepared.selection.starts),
        "methods": {glob: repr(method) for glob, method in prepared.methods.items()},
        "source_files": file_digests(prepared.target.reader.files, progress),
    }


def _manifest(
    prepared: Prepared,
    folder: RunFolder,
    audit: Audit,
    *,
    plan: dict[str, Any],
    cost: Cost,
    **found: Any,
) -> Manifest:
    """The record of a finished run."""
    method, recipe, windows = prepared.method, prepared.recipe, prepared.windows
    return Manifest(
        manifest_version=MANIFEST_VERSION,
        source=prepared.source.record,
        formats=formats_of(prepared.source.folder, folder.model),
        family=audit.family,
        method={
            "name": method.name,
            "score": scores.describe(method.score),
            "solver": solvers.describe(method.solver),
            "pattern": method.pattern.name,
            "scope": method.pattern.scope,
            "refinement": refinements.describe(method.refinement) if method.refinement else None,
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
        plan=plan,
        cost=cost,
        result=RunResult(
            decoder_sparsity=audit.sparsity,
            model_sparsity=audit.model_sparsity,
            parameters=audit.parameters,
            file_bytes=audit.file_bytes,
        ),
        **found,
    )


def _describe_allocation(prepared: Prepared, work: Path) -> dict[str, Any]:
    """The allocation, the range of its sparsities, and the measurements of a search."""
    record = {
        "name": prepared.recipe.allocation,
        "parameters": allocations.describe(prepared.allocation),
    }
    settled = settled_allocation(work)
    if not settled.exists():
        return record
    found = json.loads(settled.read_text())
    shares = found.pop("sparsity_of").values()
    return {**record, "lowest_sparsity": min(shares), "highest_sparsity": max(shares), **found}


def _write_notes(manifest: Manifest, prepared: Prepared, folder: RunFolder) -> None:
    """Write recipe, manifest, windows and card into the result."""
    if prepared.windows is not None:
        shutil.copyfile(folder.work / WINDOWS, folder.notes / WINDOWS)
    recipe_yaml = dump_recipe(prepared.recipe)
    write_text(folder.notes / "recipe.yaml", recipe_yaml)
    write_json(folder.notes / MANIFEST, manifest.to_json())
    card = prune_card(
        manifest, recipe_yaml, prepared.source.folder, prepared.recipe.output or folder.output
    )
    write_text(folder.model / "README.md", card)
