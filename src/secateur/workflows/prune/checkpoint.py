"""Prunes a checkpoint into a verified folder, and plans such a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.documents import texts_of
from secateur.calibration.windows import save_windows
from secateur.diagnostics.audit import Audit, audit_checkpoint, verify
from secateur.engine.choose.allocation import settled_allocation
from secateur.engine.job import Job
from secateur.engine.memory_budget import explained
from secateur.engine.plan import Plan
from secateur.engine.plan_time import foretell_seconds, layer_times
from secateur.engine.prune.coverage import coverage, reach
from secateur.engine.prune.group_pruning import refuse_all_zero
from secateur.engine.prune.tasks import Tasks, skipped_matrices
from secateur.models.experts import open_experts
from secateur.models.inventory import SkippedMatrix
from secateur.models.opening import formats_of, load_whole
from secateur.parallel.ranks import ALONE, Ranks
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import dump_recipe
from secateur.reporting.model_card import model_card
from secateur.reporting.results.plan import PlanResult
from secateur.reporting.results.prune import PruneResult
from secateur.runs.atomic import write_json, write_text
from secateur.runs.environment import Meter, environment
from secateur.runs.folder import NOTES, RunFolder, file_digests
from secateur.runs.ledger import Ledger
from secateur.runs.output import check_free
from secateur.runs.records import MANIFEST_VERSION, Manifest, declared
from secateur.sparsity.allocation import allocations
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.training.distillation import (
    FINAL,
    DistillationData,
    Student,
    once,
    pruned_layers,
    write_layers,
)
from secateur.training.layerwise import LayerwiseDistillation
from secateur.workflows.prune.prepare import (
    Prepared,
    choose_plan,
    fingerprint,
    prepare,
    settings_of,
    shared_inputs,
    tasks_for,
    with_own_windows,
)
from secateur.workflows.prune.workers import WorkerJob, broadcast, digest_of, refuse_cluster
from secateur.workflows.run_windows import BESIDE, refuse_shared

LEDGER, MANIFEST = "layers.jsonl", "manifest.json"
WINDOWS, CALIBRATION = "windows.safetensors", "calibration.json"
DISTILLATION_MODE = "distillation.json"

NO_PART = {"output", "compress", "memory", "on_collapse", "cluster"}
"""Fields of a recipe that do not affect the pruned weights."""


def plan_pruning(recipe: PruneRecipe) -> PlanResult:
    """What a recipe would need on this machine."""
    began = time.perf_counter()
    prepared = prepare(recipe, only_plan=True, pictures=True)
    ready = time.perf_counter() - began
    tasks = tasks_for(prepared)
    chosen, activations = choose_plan(prepared, tasks, recipe.memory)
    left = skipped_matrices(tasks, prepared.target.matrices())
    settings = settings_of(recipe, activations, None)
    seconds = foretell_seconds(
        tasks,
        shared_inputs(prepared, tasks),
        layer_times(prepared.target, prepared.planned_windows, settings),
        ready=ready,
        passed=chosen.passed_tokens,
        output_bytes=prepared.output_bytes,
        tokens=chosen.calibration_tokens,
        settings=settings,
        device=prepared.target.device,
    )
    return PlanResult(dataclasses.replace(chosen, left=left, seconds=seconds), activations)


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
        ranks: the processes that share the work; this one is the first (`order.py`).
    """
    refuse_cluster(recipe)
    meter = Meter.start()
    folder = RunFolder(recipe.output, "prune", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model, *texts_of(recipe.calibration.source))
    kept = folder.notes if folder.finished else folder.work
    windows = kept / WINDOWS if folder.state else None
    prepared = prepare(recipe, folder.model, windows, pictures=True, progress=progress)
    refuse_shared(prepared.beside, ranks)
    return run_prepared(prepared, folder, progress, meter, ranks)


def run_prepared(
    prepared: Prepared,
    folder: RunFolder,
    progress: Progress,
    meter: Meter,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Carry out a prepared recipe in a folder that no other run uses."""
    recipe = prepared.recipe
    folder.keep_apart(prepared.source.folder)
    tasks = tasks_for(prepared)
    chosen, activations = choose_plan(
        prepared, tasks, recipe.memory, ranks, _stored_sweep_windows(folder)
    )
    if not folder.finished:
        check_free(chosen.disk_bytes, folder.output, folder.partial)
    ledger = Ledger(folder.notes / LEDGER)
    folder.worth_resuming = lambda: bool(ledger.entries)
    with folder:
        folder.begin(_identity(prepared, progress))
        if folder.finished:
            broadcast(None, ranks)
            return report_of(folder.output)
        if not folder.resumed:
            refuse_all_zero(prepared.target)
        prepared = _with_kept_windows(prepared, folder, progress)
        write_json(folder.work / DISTILLATION_MODE, {"sweep_windows": chosen.sweep_windows})
        job = Job(
            prepared.target,
            tasks,
            prepared.windows,
            settings_of(recipe, activations, folder.work, ranks),
            prepared.allocation,
            prepared.sparsity,
            prepared.beside,
        )
        finished = _begin(prepared, ledger, progress)
        broadcast(_worker_job(prepared, folder, activations, finished, ledger), ranks)
        with torch.random.fork_rng(devices=[]), explained(chosen):
            torch.manual_seed(recipe.calibration.seed)
            done = job.carry_out(ledger, progress, finished)
            distilled = _distill(prepared, done, folder, chosen.sweep_windows, progress)
        reached = reach(ledger.layers, (name for name, task in done.items() if task.changes))
        left = skipped_matrices(done, prepared.target.matrices())
        audit = audit_checkpoint(
            folder.model,
            lambda name: done[name].method.pattern,
            {name: task.sparsity for name, task in done.items()},
            trust_remote_code=recipe.trust_remote_code,
            progress=progress,
        )
        verify(audit)
        manifest = _make_manifest(prepared, chosen, activations, audit, meter, folder)
        manifest["distillation"] = distilled
        found = coverage(ledger.layers, prepared.target.architecture)
        manifest["cost"]["processes"] = ranks.count
        manifest["experts"] = found and found.to_json()
        manifest["reach"] = reached.to_json()
        manifest["left"] = [one.to_json() for one in left]
        manifest["collapsed"] = [n for layer in ledger.layers for n in layer.collapsed]
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
    data = DistillationData(
        prepared.all_windows,
        recipe.calibration.seed,
        how.epochs,
        how.peak_learning_rate,
        how.next_token,
    )
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


def _stored_sweep_windows(folder: RunFolder) -> int | None:
    """How many windows a sweep of a stopped run has, whatever fits now; None for a new run."""
    told = folder.work / DISTILLATION_MODE
    if not (folder.state and told.exists()):
        return None
    windows: int = json.loads(told.read_text(encoding="utf-8"))["sweep_windows"]
    return windows


def report_of(output: Path) -> PruneResult:
    """Read the result of a finished run from its notes."""
    ledger = Ledger(output / NOTES / LEDGER)
    ledger.resume()
    manifest = json.loads((output / NOTES / MANIFEST).read_text(encoding="utf-8"))
    left = [SkippedMatrix(**one) for one in manifest["left"]]
    sparsity = manifest["result"]["decoder_sparsity"]
    return PruneResult(sparsity, ledger.layers, manifest, output, left)


def _identity(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """Everything that affects the pruned weights."""
    recipe = prepared.recipe.model_dump(mode="json", exclude=NO_PART)
    return {
        **recipe,
        "micro_batch_tokens": prepared.recipe.memory.micro_batch_tokens,
        "starts": dict(prepared.selection.starts),
        "methods": {glob: repr(method) for glob, method in prepared.methods.items()},
        "source_files": file_digests(prepared.reader.files, progress),
    }


def _with_kept_windows(prepared: Prepared, folder: RunFolder, progress: Progress) -> Prepared:
    """Add all calibration windows, and store them for a resumed run.

    The record of their source is written first, so existing windows are complete.
    """
    told = folder.work / CALIBRATION
    if prepared.stored:
        provenance = json.loads(told.read_text(encoding="utf-8"))
        return dataclasses.replace(prepared, calibration=provenance)
    if prepared.unwritten:
        prepared = with_own_windows(prepared, progress)
    if prepared.beside is not None:
        prepared.beside.save(folder.work / BESIDE)
        record = {**(prepared.calibration or {}), "beside": prepared.beside.shapes}
        prepared = dataclasses.replace(prepared, calibration=record)
    write_json(told, prepared.calibration)
    if prepared.windows is not None:
        start = (prepared.calibration or {}).get("start_tokens", ())
        extra = len(prepared.all_windows) - len(prepared.windows)
        save_windows(prepared.all_windows, folder.work / WINDOWS, start=start, extra=extra)
    return prepared


def _begin(prepared: Prepared, ledger: Ledger, progress: Progress) -> int:
    """Make the copy for the pruned weights if it is missing. Return the finished layers."""
    if ledger.begun:
        return ledger.resume()
    assert prepared.target.output is not None
    prepared.target.output.create(progress)
    ledger.begin()
    return 0


def _worker_job(
    prepared: Prepared, folder: RunFolder, activations: str, done: int, ledger: Ledger
) -> WorkerJob:
    """What the other processes of the run must know."""
    return WorkerJob(
        partial=str(folder.partial),
        state=folder.state_text(),
        windows=None if prepared.windows is None else str(folder.work / WINDOWS),
        activations=activations,
        done=done,
        entries=ledger.entries,
        source=digest_of(prepared.reader),
    )


def _make_manifest(
    prepared: Prepared, plan: Plan, activations: str, audit: Audit, meter: Meter, folder: RunFolder
) -> dict[str, Any]:
    """The record of a finished run."""
    method = prepared.method
    return {
        "manifest_version": MANIFEST_VERSION,
        "source": prepared.source.record(),
        "formats": formats_of(prepared.source.folder, folder.model),
        "family": audit.family,
        "method": {
            "name": method.name,
            "score": scores.describe(method.score),
            "solver": solvers.describe(method.solver),
            "pattern": method.pattern.name,
            "scope": method.pattern.scope,
            "refinement": refinements.describe(method.refinement) if method.refinement else None,
            "effort": prepared.recipe.effort,
            "sequential": prepared.recipe.sequential,
            "asymmetric": prepared.recipe.asymmetric,
            "fast_matmuls": prepared.recipe.fast_matmuls,
            "reconstruction": prepared.recipe.reconstruction.model_dump(),
            "distillation": prepared.recipe.distillation.model_dump(),
            "asked_sparsity": prepared.sparsity,
        },
        "allocation": _describe_allocation(prepared, folder.work),
        "calibration": prepared.calibration,
        "calibration_digest": fingerprint(prepared.windows),
        "environment": environment(prepared.target.device),
        "plan": {**plan.to_json(), "activations": activations},
        "cost": {**meter.read(), "resumed": folder.resumed},
        "result": {
            "decoder_sparsity": audit.sparsity,
            "model_sparsity": audit.model_sparsity,
            "parameters": audit.parameters,
            "file_bytes": audit.file_bytes,
        },
    }


def _describe_allocation(prepared: Prepared, work: Path) -> dict[str, Any]:
    """The allocation, the range of its sparsities, and the measurements of a search."""
    told = {
        "name": prepared.recipe.allocation,
        "parameters": allocations.describe(prepared.allocation),
    }
    settled = settled_allocation(work)
    if not settled.exists():
        return told
    found = json.loads(settled.read_text())
    shares = found.pop("sparsity_of").values()
    return {**told, "lowest_sparsity": min(shares), "highest_sparsity": max(shares), **found}


def _write_notes(manifest: dict[str, Any], prepared: Prepared, folder: RunFolder) -> None:
    """Write recipe, manifest, windows and card into the result."""
    if prepared.windows is not None:
        shutil.copyfile(folder.work / WINDOWS, folder.notes / WINDOWS)
    recipe_yaml = dump_recipe(prepared.recipe)
    write_text(folder.notes / "recipe.yaml", recipe_yaml)
    write_json(folder.notes / MANIFEST, declared(Manifest, manifest))
    card = model_card(
        manifest, recipe_yaml, prepared.source.folder, prepared.recipe.output or folder.output
    )
    write_text(folder.model / "README.md", card)
