"""Cuts structure: the result has fewer layers, heads, neurons, channels or experts.

plan in units ─► steps, each a smaller model ─► distillation from the uncut model ─► verified

The distillation is optional: the smaller model learns from the uncut one.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import texts_of
from secateur.calibration.run_windows import WINDOWS, RunWindows, WindowReader
from secateur.calibration.windows import load_windows
from secateur.engine.plan_memory import PrunePlan, choose_sweeps, store_choice, stored_choice
from secateur.engine.prepared import choose_plan, prepare
from secateur.engine.prune.refit import can_refit
from secateur.engine.search.experts import expert_use
from secateur.engine.stream.targets import CheckpointTarget, Target
from secateur.errors import RecipeError, VerificationError
from secateur.evaluation.step_time import StepTimer, time_steps
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader, shard_files
from secateur.models.copies import copy_of
from secateur.models.opening import form_of, formats_of, open_weights, refuse_quantized
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.recipes.structure import StructureRecipe, WhatToCut
from secateur.reporting.cards import structure_card
from secateur.reporting.models import StructureResult
from secateur.reporting.plan import CutPlanResult
from secateur.runs.atomic import write_json, write_text
from secateur.runs.environment import Meter, choose_device, environment
from secateur.runs.folder import RunFolder, check_output, file_digests
from secateur.runs.records import (
    MANIFEST_VERSION,
    Cost,
    Manifest,
    RunResult,
    StepEntry,
    Structure,
    read_record,
)
from secateur.steps.processes import broadcast, refuse_another_model
from secateur.steps.prune import Prune
from secateur.steps.runner import RunContext, finish, source_of
from secateur.steps.structure.learned import choose_learned
from secateur.structured.accounting import Accounting, accounting
from secateur.structured.cut import Cut
from secateur.structured.cut_plan import (
    CutPlan,
    check_width,
    counted_cut,
    plan_cut,
    trims_vocabulary,
)
from secateur.structured.cut_steps import (
    NOTES,
    CutContext,
    CutStep,
    RefitStep,
    SurveyJob,
    check_vocabulary,
    choose_experts,
    choose_hidden,
    choose_layers,
    trimmed_source,
)
from secateur.structured.latency import LATENCY, find_latency
from secateur.structured.width import (
    UnitSelection,
    kept_queries,
    kept_width,
    pruning_values,
    query_selection,
    score_of,
    width_selection,
)
from secateur.training.distillation import DistillationData
from secateur.training.distilled_checkpoint import (
    distill_checkpoint,
)

log = logging.getLogger(__name__)

MANIFEST, STEPS = "manifest.json", "steps.json"

SHARED = {"model", "experts"}
"""The fields of `WhatToCut` that several processes may fill."""

VARIED = (
    "no class of transformers has these sizes (layers that differ, or heads that do not divide the "
    "hidden size): the result loads once secateur is imported, or with trust_remote_code=True; "
    "other engines need --pad"
)


def plan_structure(
    recipe: StructureRecipe, progress: Progress, call: Mapping[str, Any]
) -> CutPlanResult:
    """Check a recipe, and show what the cut would leave and need.

    Args:
        recipe: recipe of the cut.
        progress: receives the download of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the cut would.
    """
    source, skeleton, plan = _open(recipe, progress)
    steps = [step.name for step in _steps_of(recipe, plan, skeleton)]
    trimmed = trims_vocabulary(recipe)
    steps = ["vocabulary"] * trimmed + steps + ["distillation"] * bool(recipe.distillation.epochs)
    found = counted_cut(recipe, plan, skeleton)
    conditions = {
        "--vocabulary": trimmed,
        "--decode-latency": recipe.decode_latency is not None,
        "--depth-units blocks": recipe.depth.units == "blocks" and plan.drop_layers > 0,
    }
    unknown = tuple(name for name, given in conditions.items() if given)
    memory = None
    if plan.narrows and recipe.learned is None:
        memory = _plan_width_run(recipe, plan, source.folder)
    size = found.before.file_bytes if unknown else found.after.file_bytes
    read = [recipe.model, str(source.folder), *texts_of(recipe.calibration.source)]
    check_output(recipe.output, "structure", size, read, call)
    after = None if unknown else found.after
    return CutPlanResult(tuple(steps), found.before, after, unknown, memory)


def _open(recipe: StructureRecipe, progress: Progress) -> tuple[LocalCheckpoint, Any, CutPlan]:
    """Open the model and check the recipe: the checkpoint, its skeleton, and the plan in units."""
    source = resolve(
        recipe.model,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
    )
    open_weights(source.folder)  # refuses what is not read
    if recipe.learned is not None:
        refuse_quantized(source.folder)
    skeleton = build_skeleton(source.folder, trust_remote_code=recipe.trust_remote_code)
    plan = plan_cut(recipe, skeleton)
    check_width(recipe, plan, skeleton)
    check_vocabulary(recipe, source, skeleton)
    return source, skeleton, plan


def structure_recipe(
    recipe: StructureRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    timer: StepTimer = time_steps,
    ranks: Ranks = ALONE,
) -> StructureResult:
    """Cut structure out of a checkpoint, and write a new, smaller one.

    Args:
        recipe: recipe of the cut.
        progress: receives every step.
        resume: resume a stopped run to this output, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
        timer: measures the time of a token, if the recipe has a target in time.
        ranks: the processes that share the survey of experts; this one is the first.

    Raises:
        SecateurError: what, where, and what to do.
    """
    refuse_several(recipe, ranks.count)
    meter = Meter.start()
    folder = RunFolder(
        recipe.output, "structure", resume=resume, restart=restart, overwrite=overwrite
    )
    domains = recipe.learned.domains if recipe.learned is not None else ()
    folder.keep_apart(recipe.model, *texts_of(recipe.calibration.source), *domains)
    source, skeleton, plan = _open(recipe, progress)
    folder.keep_apart(source.folder)
    with folder:
        identity = {
            **recipe.model_dump(mode="json", exclude={"output", "memory"}),
            "micro_batch_tokens": recipe.memory.micro_batch_tokens,
            "source_files": file_digests(shard_files(source.folder), progress),
        }
        folder.begin(identity)
        if not folder.finished:
            folder.worth_resuming = lambda: bool(list(folder.work.glob(f"*/{NOTES}")))
            _cut_into(folder, recipe, source, skeleton, plan, timer, progress, meter, ranks)
    broadcast(None, ranks)
    return StructureResult(read_record(Manifest, folder.notes / MANIFEST), folder.output)


def _steps_of(recipe: StructureRecipe, plan: CutPlan, model: Any) -> list[CutStep | RefitStep]:
    """The steps that a plan needs, in order. The model is the uncut skeleton."""
    if recipe.learned is not None:
        return [CutStep("learned", choose_learned)]
    found: list[CutStep | RefitStep] = []
    if plan.drop_layers:
        found.append(CutStep("depth", choose_layers))
    if plan.keep_experts is not None:
        found.append(CutStep("experts", choose_experts))
    if plan.keep_hidden is not None:
        found.append(CutStep("hidden", choose_hidden))
    channels = plan.keep_hidden is not None
    helps = recipe.asymmetric and (channels or plan.drop_layers > 0)
    if helps and can_refit(describe(model), channels=channels):
        found.append(RefitStep())
    if plan.keep_queries is not None:
        found.append(CutStep("queries", _choose_queries))
    if plan.narrows:
        found.append(CutStep("width", _choose_width))
    return found


def _choose_queries(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the query heads to keep in each KV group, and refit their readers in a folder."""
    heads, made = context.plan.keep_queries, context.work / "thinned"
    assert heads is not None
    _prune_units(context, folder, made, "uniform", lambda target: query_selection(target, heads))
    cut = kept_queries(CheckpointReader(made), heads, context.recipe.trust_remote_code)
    return cut, _score_record(context.recipe), made


def _choose_width(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the heads and neurons to keep, and refit their readers in a folder."""
    recipe, plan, made = context.recipe, context.plan, context.work / "narrowed"
    allocation = recipe.allocation or "uniform"
    _prune_units(
        context, folder, made, allocation, lambda target: width_selection(target, recipe, plan)
    )
    cut = kept_width(CheckpointReader(made), allocation == "uniform", recipe.trust_remote_code)
    return cut, _score_record(recipe) | {"allocation": allocation}, made


def _score_record(recipe: StructureRecipe) -> dict[str, Any]:
    """What chose the units of a pruning run."""
    return {"score": score_of(recipe), "solver": recipe.solver}


def _prune_units(
    context: CutContext,
    folder: Path,
    made: Path,
    allocation: str,
    select: Callable[[Target], UnitSelection],
) -> None:
    """Prune whole units of a model folder into another, unless an earlier run did."""
    if made.exists():
        return
    folder_of_run, calibration = RunFolder(made, "prune", resume=True), context.recipe.calibration
    meter = Meter.start()
    values = pruning_values(context.recipe, allocation) | {
        "model": str(folder),
        "output": str(made),
        "calibration": {"source": str(context.windows_file), "seed": calibration.seed},
    }
    recipe = build_recipe(PruneRecipe, values)
    source = source_of(recipe, context.progress)
    prepared = prepare(recipe, source, folder_of_run.model)
    prepared = select(prepared.target).applied(prepared)
    finish(Prune(prepared, RunContext(folder_of_run, source, context.progress, meter)))


def _plan_width_run(recipe: StructureRecipe, plan: CutPlan, folder: Path) -> PrunePlan:
    """Plan the pruning run that cuts heads and neurons, on the uncut model: the largest there is.

    Raises:
        MemoryBudgetError: the run exceeds the budget.
    """
    values = pruning_values(recipe, recipe.allocation or "uniform") | {
        "model": str(folder),
        "calibration": recipe.calibration.model_dump(),
    }
    pruning = build_recipe(PruneRecipe, values)
    prepared = prepare(pruning, source_of(pruning, Silent()), only_plan=True)
    prepared = width_selection(prepared.target, recipe, plan).applied(prepared)
    return choose_plan(prepared, prepared.tasks(), recipe.memory)[0]


def _cut_into(
    folder: RunFolder,
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    skeleton: Any,
    plan: CutPlan,
    timer: StepTimer,
    progress: Progress,
    meter: Meter,
    ranks: Ranks,
) -> None:
    """Run all steps that no earlier run finished, and write the result."""
    device, latency = choose_device(recipe.device), None
    base, steps = trimmed_source(recipe, source, folder.work, progress)
    trimmed = build_skeleton(base.folder, trust_remote_code=recipe.trust_remote_code)
    if steps:
        plan = plan_cut(recipe, trimmed)
    none = torch.empty((0, 0), dtype=torch.int64)
    windows = RunWindows(none, none, {})
    if plan.cuts or recipe.decode_latency or recipe.distillation.epochs:
        windows = _calibrate(recipe, base, trimmed.config, folder, progress)
    if recipe.decode_latency is not None:
        latency = find_latency(
            recipe,
            plan,
            trimmed,
            device,
            lambda models: astuple(timer(models, device, progress)),
            folder.work / LATENCY,
        )
        plan = replace(plan, joint=latency["joint"])
    made, file = base.folder, folder.work / WINDOWS
    context = CutContext(
        recipe, plan, base.folder, windows.calibration, file, device, folder.work, progress, ranks
    )
    for step in _steps_of(recipe, plan, trimmed):
        made, notes = step.run(context, made)
        steps.append(notes)
    stored = open_weights(made) if recipe.distillation.epochs else CheckpointReader(made)
    copy_of(stored, folder.model).create(progress)
    (folder.model / NOTES).unlink(missing_ok=True)
    distilled = None
    if recipe.distillation.epochs:
        distilled = _distill(recipe, base, folder, windows.all, device, progress)
    found = _verified(skeleton, source.folder, folder.model, steps, recipe)
    if found.varied:
        log.warning(VARIED)
    structure = Structure(
        steps=tuple(_summary(step) for step in steps),
        before=found.before,
        after=found.after,
        decoder_removed=found.decoder_removed,
        removed=found.removed,
        varied=found.varied,
        latency=latency,
    )
    manifest = _manifest_of(
        recipe, source, structure, distilled, windows.record, meter, device, folder
    )
    write_json(folder.notes / STEPS, [StepEntry(**step).to_json() for step in steps])
    if windows.record:
        shutil.copyfile(file, folder.notes / WINDOWS)
    _write_notes(folder, recipe, manifest, source)
    folder.finish()


def _write_notes(
    folder: RunFolder, recipe: StructureRecipe, manifest: Manifest, source: LocalCheckpoint
) -> None:
    """Write the recipe, the manifest and the card."""
    recipe_yaml = dump_recipe(recipe)
    write_text(folder.notes / "recipe.yaml", recipe_yaml)
    write_json(folder.notes / MANIFEST, manifest.to_json())
    card = structure_card(manifest, recipe_yaml, source.folder, recipe.output or folder.output)
    write_text(folder.model / "README.md", card)


def _calibrate(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    config: Any,
    folder: RunFolder,
    progress: Progress,
) -> RunWindows:
    """Make the windows of a run, or read those of a stopped one."""
    file, trust = folder.work / WINDOWS, recipe.trust_remote_code
    if file.exists():
        return RunWindows.load(file, config)
    options, device = recipe.calibration, choose_device(recipe.device)
    reader = WindowReader.of_folder(source.folder, config, trust_remote_code=trust)
    return RunWindows.cut(reader, options, recipe.distillation).complete(
        folder.work, source.folder, device, options.seed, progress, trust_remote_code=trust
    )


def _distill(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    folder: RunFolder,
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> dict[str, float] | None:
    """Distill the uncut model into the cut one, and overwrite its weights with the result."""
    how, trust, reader = recipe.distillation, recipe.trust_remote_code, open_weights(source.folder)
    dense = CheckpointTarget(reader, None, device, trust_remote_code=trust)
    size = stored_choice(folder.work)
    if size is None:  # planned with two models of the uncut size
        size = choose_sweeps(how, dense, windows, {}, recipe.memory.max_bytes)
        store_choice(folder.work, size)
    data = DistillationData(windows, how, recipe.calibration.seed)
    return distill_checkpoint(
        dense, folder.model, None, data, size, folder.work, progress, trust_remote_code=trust
    )


def _verified(
    skeleton: Any, source: Path, whole: Path, steps: list[dict[str, Any]], recipe: StructureRecipe
) -> Accounting:
    """Count the parameters of the written model, and compare them with the notes of the steps."""
    made = build_skeleton(whole, trust_remote_code=recipe.trust_remote_code)
    before, after = accounting(skeleton, Cut()).before, accounting(made, Cut()).before
    if form_of(source) is not None:
        before = before.model_copy(update={"file_bytes": CheckpointReader(source).total_bytes})
        after = after.model_copy(update={"file_bytes": CheckpointReader(whole).total_bytes})
    promised = steps[-1]["after"]["decoder"]
    if after.decoder != promised:
        raise VerificationError(
            f"the decoder has {after.decoder:,} parameters, the cut promised {promised:,}",
            where=str(whole),
            remedy="this is a fault in secateur; please report it",
        )
    return Accounting(before, after, steps[-1]["varied"])


def _manifest_of(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    structure: Structure,
    distilled: Mapping[str, float] | None,
    calibration: Mapping[str, Any],
    meter: Meter,
    device: torch.device,
    folder: RunFolder,
) -> Manifest:
    """The record of a finished cut."""
    return Manifest(
        manifest_version=MANIFEST_VERSION,
        source=source.record,
        method={
            "name": "structure",
            "score": recipe.score,
            "solver": recipe.solver,
            "pattern": ", ".join(step["step"] for step in structure.steps),
            "scope": "layer",
            "effort": recipe.effort,
            "asymmetric": recipe.asymmetric,
            "fast_matmuls": recipe.fast_matmuls,
            "distillation": recipe.distillation.model_dump(),
        },
        allocation={"name": recipe.allocation or "uniform"},
        structure=structure,
        distillation=None if distilled is None else dict(distilled),
        calibration=dict(calibration) or None,
        environment=environment(device),
        cost=Cost.model_validate({**meter.read(), "resumed": folder.resumed}),
        result=RunResult(
            decoder_sparsity=0.0,
            model_sparsity=0.0,
            parameters=structure.after.parameters,
            file_bytes=structure.after.file_bytes,
        ),
        formats=formats_of(source.folder, folder.model),
    )


def _summary(step: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of a step without its lists of indices, which `steps.json` keeps."""
    tokens = {k: step[k] for k in ("tokens_before", "tokens_after", "covered") if k in step}
    return {
        "step": step["step"],
        "by": step.get("by", step.get("solver")),
        "decoder_before": step["before"]["decoder"],
        "decoder_after": step["after"]["decoder"],
        **tokens,
    }


def run_worker(recipe: StructureRecipe, ranks: Ranks) -> None:
    """Do the share of one process, which is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    while (content := broadcast(None, ranks)) is not None:
        job = SurveyJob(**content)
        file = Path(job.windows)
        if not file.exists():
            raise RecipeError(
                f"process {ranks.rank} on {socket.gethostname()} does not see the calibration "
                "windows of the run",
                where=job.windows,
                remedy="put --output on a file system that all machines share",
            )
        trust = recipe.trust_remote_code
        source = resolve(recipe.model, dtype=recipe.dtype, trust_remote_code=trust)
        reader = open_weights(source.folder)
        if reader.tensor_digest != job.source:
            refuse_another_model(ranks.rank, source.folder)
        target = CheckpointTarget(
            reader, None, choose_device(recipe.device), trust_remote_code=trust
        )
        tokens = recipe.memory.micro_batch_tokens
        expert_use(target, load_windows(file), tokens, Silent(), ranks)


def refuse_several(recipe: StructureRecipe, count: int) -> None:
    """Refuse what several processes cannot share yet.

    Raises:
        RecipeError: names the option.
    """
    if count == 1:
        return
    other = [
        name
        for name, field in WhatToCut.model_fields.items()
        if name not in SHARED and getattr(recipe, name) != field.default
    ]
    if recipe.learned is not None:
        other.append("learned")
    if recipe.distillation.epochs:
        other.append("distill_epochs")
    if recipe.calibration.generated_windows:
        other.append("generated_windows")
    if other:
        option = f"--{other[0].replace('_', '-')}"
        raise RecipeError(
            f"{option} does not work with several processes yet, and there are {count}: they "
            "share only the survey of --experts",
            remedy="start without torchrun, or cut the experts first and the rest in a second run",
        )
