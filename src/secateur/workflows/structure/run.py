"""Cuts structure: the result has fewer layers, heads, neurons, channels or experts.

plan in units ─► steps, each a smaller model ─► distillation from the uncut model ─► verified

The distillation is optional: the smaller model learns from the uncut one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.calibration.continuation import PREFIX
from secateur.calibration.documents import texts_of
from secateur.calibration.loading import load_calibration
from secateur.calibration.windows import EXTRA, load_windows, save_windows
from secateur.engine.memory_budget import memory_budget
from secateur.engine.plan import distilling_bytes
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import VerificationError
from secateur.evaluation.step_time import StepTimer, time_steps
from secateur.models.architecture import describe, hidden_size, positions_of, text_config
from secateur.models.checkpoint import CheckpointReader, PatchedCopy, shard_files
from secateur.models.copies import copy_of
from secateur.models.opening import form_of, formats_of, load_whole, open_weights, refuse_quantized
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.parallel.ranks import ALONE, Ranks
from secateur.precision import fast_dtype
from secateur.progress import Progress, Silent, listener
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.reading import dump_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.results.plan import CutPlanResult
from secateur.reporting.results.prune import StructureResult
from secateur.reporting.structure_card import structure_card
from secateur.runs.atomic import write_json, write_text
from secateur.runs.environment import Meter, choose_device, environment, resident_bytes
from secateur.runs.folder import RunFolder, check_output, file_digests
from secateur.runs.records import MANIFEST_VERSION, Manifest, StepEntry, declared
from secateur.structured.accounting import Accounting, accounting
from secateur.structured.cut import Cut
from secateur.training.distillation import FINAL, DistillationData, Student, once, trainable_names
from secateur.training.layerwise import LayerwiseDistillation
from secateur.workflows.prune.prepare import SWEEP_WINDOWS, log_sweeps
from secateur.workflows.prune.workers import broadcast
from secateur.workflows.run_windows import (
    extra_windows,
    log_short_text,
    split_extra,
    window_plan,
    with_generated_windows,
)
from secateur.workflows.structure.cut_plan import CutPlan, plan_cut
from secateur.workflows.structure.learned import check_learned, choose_learned
from secateur.workflows.structure.steps import (
    NOTES,
    RefitStep,
    Step,
    StepContext,
    choose_experts,
    choose_hidden,
    choose_layers,
    choose_queries,
    choose_width,
    refits,
    refuse_several,
)
from secateur.workflows.structure.vocabulary import check_vocabulary, trimmed_source
from secateur.workflows.structure.width import (
    FILE,
    check_width,
    counted_cut,
    found_latency,
    planned_width,
)

log = logging.getLogger(__name__)


CALIBRATION, WINDOWS = "calibration.json", "windows.safetensors"


MANIFEST, STEPS = "manifest.json", "steps.json"


WAY = "way.json"
"""The file with the number of windows in a sweep."""


VARIED = (
    "no class of transformers has these sizes (layers that differ, or heads that do not divide the "
    "hidden size): the result loads once secateur is imported, or with trust_remote_code=True; "
    "other engines need --pad"
)


Read = tuple[Tensor, dict[str, Any]]
"""Calibration windows [samples, sequence_length], and the record of their source."""


@takes_options_of(StructureRecipe)
def structure(
    model: str | Path, *, progress: Progress | None = None, **options: Any
) -> StructureResult | CutPlanResult:
    """Cut structure out of a checkpoint, and write a new, smaller one.

    Args:
        model: hub id, folder, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The result of the cut; with `dry_run` its plan.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(StructureRecipe, {"model": model}, options)
    if call.pop("dry_run", False):
        return plan_structure(recipe, call)
    return structure_recipe(recipe, listener(progress), **call)


def plan_structure(recipe: StructureRecipe, call: Mapping[str, Any]) -> CutPlanResult:
    """Check a recipe, and show what the cut would leave and need.

    Args:
        recipe: recipe of the cut.
        call: the other options of the call.

    Raises:
        SecateurError: as the cut would.
    """
    source, skeleton, aim = opened(recipe, Silent())
    steps = [step.name for step in steps_of(recipe, aim, skeleton)]
    tokens = recipe.vocabulary is not None or recipe.vocabulary_size is not None
    steps = ["vocabulary"] * tokens + steps + ["distillation"] * bool(recipe.distillation.epochs)
    found = counted_cut(recipe, aim, skeleton)
    unknown = [
        name
        for name, given in {
            "--vocabulary": tokens,
            "--decode-latency": recipe.decode_latency is not None,
            "--depth-units blocks": recipe.depth.units == "blocks" and aim.drop_layers > 0,
        }.items()
        if given
    ]
    fits = aim.narrows and recipe.learned is None
    plan = planned_width(recipe, aim, source.folder) if fits else None
    size = found.before.file_bytes if unknown else found.after.file_bytes
    read = [recipe.model, str(source.folder), *texts_of(recipe.calibration.source)]
    check_output(recipe.output, "structure", size, read, call)
    return CutPlanResult(
        tuple(steps), found.before, None if unknown else found.after, tuple(unknown), plan
    )


def opened(recipe: StructureRecipe, progress: Progress) -> tuple[LocalCheckpoint, Any, CutPlan]:
    """Open the model and check the recipe: the checkpoint, its skeleton, and the plan in units.

    Raises:
        SecateurError: what, where, and what to do.
    """
    check_learned(recipe)
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
    aim = plan_cut(recipe, skeleton)
    check_width(recipe, aim, skeleton)
    check_vocabulary(recipe, source, skeleton)
    return source, skeleton, aim


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
    """Carry out a recipe into a new folder.

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
    source, skeleton, aim = opened(recipe, progress)
    folder.keep_apart(source.folder)
    with folder:
        folder.begin(identity(recipe, source, progress))
        if not folder.finished:
            folder.worth_resuming = lambda: bool(list(folder.work.glob(f"*/{NOTES}")))
            cut_into(folder, recipe, source, skeleton, aim, timer, progress, meter, ranks)
    broadcast(None, ranks)
    manifest = json.loads((folder.notes / MANIFEST).read_text(encoding="utf-8"))
    return StructureResult(manifest, folder.output)


def identity(
    recipe: StructureRecipe, source: LocalCheckpoint, progress: Progress
) -> dict[str, Any]:
    """Everything that affects the cut model."""
    return {
        **recipe.model_dump(mode="json", exclude={"output", "memory"}),
        "micro_batch_tokens": recipe.memory.micro_batch_tokens,
        "source_files": file_digests(shard_files(source.folder), progress),
    }


def steps_of(recipe: StructureRecipe, aim: CutPlan, model: Any) -> list[Step | RefitStep]:
    """Return the steps that a plan needs, in order. The model is the uncut skeleton."""
    if recipe.learned is not None:
        return [Step("learned", choose_learned)]
    found: list[Step | RefitStep] = []
    if aim.drop_layers:
        found.append(Step("depth", choose_layers))
    if aim.keep_experts is not None:
        found.append(Step("experts", choose_experts))
    if aim.keep_hidden is not None:
        found.append(Step("hidden", choose_hidden))
    if refits(recipe, aim, describe(model)):
        found.append(RefitStep())
    if aim.keep_queries is not None:
        found.append(Step("queries", choose_queries))
    if aim.narrows:
        found.append(Step("width", choose_width))
    return found


def cut_into(
    folder: RunFolder,
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    skeleton: Any,
    aim: CutPlan,
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
        aim = plan_cut(recipe, trimmed)
    lessons, calibration = calibration_of(recipe, base, trimmed.config, folder, aim, progress)
    windows, _ = split_extra(lessons, calibration.get(EXTRA, 0))
    if recipe.decode_latency is not None:
        latency = found_latency(recipe, aim, trimmed, device, timer, progress, folder.work / FILE)
        aim = replace(aim, joint=latency["joint"])
    made = base.folder
    context = StepContext(
        recipe,
        aim,
        base.folder,
        windows,
        folder.work / WINDOWS,
        device,
        folder.work,
        progress,
        ranks,
    )
    for step in steps_of(recipe, aim, trimmed):
        made, notes = step.carry_out(context, made)
        steps.append(notes)
    stored = open_weights(made) if recipe.distillation.epochs else CheckpointReader(made)
    copy_of(stored, folder.model).create(progress)
    (folder.model / NOTES).unlink(missing_ok=True)
    distilled = distill(recipe, base, folder, lessons, device, progress)
    found = verified(skeleton, source.folder, folder.model, steps, recipe)
    if found.varied:
        log.warning(VARIED)
    manifest = manifest_of(recipe, source, steps, distilled, calibration, found, meter, device)
    manifest["formats"] = formats_of(source.folder, folder.model)
    manifest["structure"]["latency"] = latency
    manifest["cost"]["resumed"] = folder.resumed
    write_json(folder.notes / STEPS, [declared(StepEntry, step) for step in steps])
    if calibration:
        shutil.copyfile(folder.work / WINDOWS, folder.notes / WINDOWS)
    recipe_yaml = dump_recipe(recipe)
    write_text(folder.notes / "recipe.yaml", recipe_yaml)
    write_json(folder.notes / MANIFEST, declared(Manifest, manifest))
    card = structure_card(manifest, recipe_yaml, source.folder, recipe.output or folder.output)
    write_text(folder.model / "README.md", card)
    folder.finish()


def read_calibration(recipe: StructureRecipe, source: LocalCheckpoint, config: Any) -> Read:
    """Return the calibration windows of the text, the extra ones at the end, and their record."""
    options, tokenizer = recipe.calibration, None
    plan = window_plan(options, config)
    plan = replace(plan, extra=extra_windows(plan, options, recipe.distillation))
    if not options.source.endswith(".safetensors"):
        tokenizer = load_tokenizer(source.folder, trust_remote_code=recipe.trust_remote_code)
    windows, record = load_calibration(
        options.source,
        tokenizer,
        plan,
        field=options.field,
        vocab_size=text_config(config).vocab_size,
        positions=positions_of(config),
    )
    log_short_text(plan.extra, record)
    return windows, record


def calibration_of(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    config: Any,
    folder: RunFolder,
    aim: CutPlan,
    progress: Progress,
) -> Read:
    """Return the windows of the text, those that the uncut model generates, and the extra ones.

    Without a step that reads them there are none, and no record.
    A resumed run reads the stored windows. The record of their source is written last, so a record
    means that the windows are complete.
    """
    if not (aim.cuts or recipe.decode_latency or recipe.distillation.epochs):
        return torch.empty((0, 0), dtype=torch.int64), {}
    file, record = folder.work / WINDOWS, folder.work / CALIBRATION
    if record.exists():
        return load_windows(file), json.loads(record.read_text(encoding="utf-8"))
    windows, provenance = read_calibration(recipe, source, config)
    windows, extra = split_extra(windows, provenance.get(EXTRA, 0))
    options = recipe.calibration
    if options.generated_windows:
        windows = with_generated_windows(
            source.folder,
            windows,
            options.generated_windows,
            options.seed,
            choose_device(recipe.device),
            progress,
            trust_remote_code=recipe.trust_remote_code,
        )
        provenance = {
            **provenance,
            "generated": options.generated_windows,
            "generated_prefix": PREFIX,
        }
    start, count = provenance.get("start_tokens", ()), provenance.get(EXTRA, 0)
    windows = torch.cat([windows, extra])
    save_windows(windows, file, start=start, extra=count)
    write_json(record, provenance)
    return windows, provenance


def distill(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    folder: RunFolder,
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> dict[str, float] | None:
    """Distill the uncut model into the cut one, and overwrite its weights with the result.

    Both models are in memory if they fit, else one decoder layer (`training/layerwise.py`). In
    memory everything learns but the embeddings and the head; in sweeps the decoder layers learn.
    """
    if not recipe.distillation.epochs:
        return None
    trust, reader = recipe.trust_remote_code, CheckpointReader(folder.model)
    dense = CheckpointTarget(open_weights(source.folder), None, device, trust_remote_code=trust)
    made = CheckpointTarget(
        reader, PatchedCopy(reader, folder.model), device, trust_remote_code=trust
    )
    size = sweep_windows_of(recipe, dense, folder, windows)
    how = recipe.distillation
    data = DistillationData(
        windows, recipe.calibration.seed, how.epochs, how.peak_learning_rate, how.next_token
    )
    if size:
        return learn_streamed(recipe, dense, made, folder, data, size, progress)
    return learn_whole(recipe, source, made, folder, data, progress)


def sweep_windows_of(
    recipe: StructureRecipe, dense: CheckpointTarget, folder: RunFolder, windows: Tensor
) -> int:
    """Return the number of windows in a sweep; 0 if both whole models fit into memory.

    The choice is stored, so a resumed run keeps it.
    """
    told, asked = folder.work / WAY, recipe.distillation.sweep_windows
    if told.exists():
        return int(json.loads(told.read_text(encoding="utf-8"))["sweep_windows"])
    size = asked or 0
    if asked is None:
        budget = memory_budget(recipe.memory.max_bytes, dense.device).computing
        # of two models of the uncut size
        needed = distilling_bytes(dense, windows[:1])
        needed += resident_bytes() if dense.device.type == "cpu" else 0
        if needed > budget:
            size = SWEEP_WINDOWS
            log_sweeps(size, needed, budget)
    write_json(told, {"sweep_windows": size})
    return size


def learn_streamed(
    recipe: StructureRecipe,
    dense: CheckpointTarget,
    made: CheckpointTarget,
    folder: RunFolder,
    data: DistillationData,
    size: int,
    progress: Progress,
) -> dict[str, float]:
    """Distill with one decoder layer in memory."""
    width = hidden_size(made.model)

    def student_of(module: nn.Module, number: int) -> Student:
        return Student(module, frozenset(trainable_names(made, number)), width)

    return LayerwiseDistillation(
        dense,
        folder.model,
        range(len(made.layers)),
        student_of,
        data,
        size,
        folder.work / "distillation",
        progress,
        trust_remote_code=recipe.trust_remote_code,
    ).learn_into(made)


def learn_whole(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    made: CheckpointTarget,
    folder: RunFolder,
    data: DistillationData,
    progress: Progress,
) -> dict[str, float]:
    """Distill with both models in memory."""
    saved, device, trust = folder.work / "distillation", made.device, recipe.trust_remote_code

    def train() -> dict[str, float]:
        teacher = load_whole(
            source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust
        )
        student = load_whole(folder.model, device, trust_remote_code=trust)
        outside = {id(p) for p in student.get_input_embeddings().parameters()}
        outside |= {id(p) for p in student.get_output_embeddings().parameters()}
        trained = [
            name
            for name, p in student.named_parameters()
            if id(p) not in outside and p.is_floating_point() and p.numel()
        ]
        width = hidden_size(student)
        return Student(student, frozenset(trained), width).learn(teacher, data, progress, saved)

    losses = once(saved, train)
    assert made.output is not None
    with safe_open(saved / FINAL, "pt") as learned:
        for name in learned.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            made.output.write(made.stored[name], learned.get_tensor(name))
    made.output.sync()
    return losses


def verified(
    skeleton: Any, source: Path, whole: Path, steps: list[dict[str, Any]], recipe: StructureRecipe
) -> Accounting:
    """Count the parameters of the written model, and compare them with the notes of the steps.

    Raises:
        VerificationError: the numbers of parameters differ.
    """
    made = build_skeleton(whole, trust_remote_code=recipe.trust_remote_code)
    before, after = accounting(skeleton, Cut()).before, accounting(made, Cut()).before
    if form_of(source) is not None:
        before = replace(before, file_bytes=CheckpointReader(source).total_bytes)
        after = replace(after, file_bytes=CheckpointReader(whole).total_bytes)
    promised = steps[-1]["after"]["decoder"]
    if after.decoder != promised:
        raise VerificationError(
            f"the decoder has {after.decoder:,} parameters, the cut promised {promised:,}",
            where=str(whole),
            remedy="this is a fault in secateur; please report it",
        )
    return Accounting(before, after, steps[-1]["varied"])


def manifest_of(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    steps: list[dict[str, Any]],
    distilled: Mapping[str, float] | None,
    calibration: Mapping[str, Any],
    found: Accounting,
    meter: Meter,
    device: torch.device,
) -> dict[str, Any]:
    """The record of a finished cut."""
    return {
        "manifest_version": MANIFEST_VERSION,
        "source": source.record(),
        "method": {
            "name": "structure",
            "score": recipe.score,
            "solver": recipe.solver,
            "pattern": ", ".join(step["step"] for step in steps),
            "scope": "layer",
            "effort": recipe.effort,
            "asymmetric": recipe.asymmetric,
            "fast_matmuls": recipe.fast_matmuls,
            "distillation": recipe.distillation.model_dump(),
        },
        "allocation": {"name": recipe.allocation or "uniform"},
        "structure": {
            "steps": [summary(step) for step in steps],
            "before": {**asdict(found.before), "parameters": found.before.parameters},
            "after": {**asdict(found.after), "parameters": found.after.parameters},
            "decoder_removed": found.decoder_removed,
            "removed": found.removed,
            "varied": found.varied,
        },
        "distillation": distilled,
        "calibration": dict(calibration) or None,
        "environment": environment(device),
        "cost": {**meter.read(), "resumed": False},
        "result": {
            "decoder_sparsity": 0.0,
            "model_sparsity": 0.0,
            "parameters": found.after.parameters,
            "file_bytes": found.after.file_bytes,
        },
    }


def summary(step: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of a step without its lists of indices, which `steps.json` keeps."""
    tokens = {k: step[k] for k in ("tokens_before", "tokens_after", "covered") if k in step}
    return {
        "step": step["step"],
        "by": step.get("by", step.get("solver")),
        "decoder_before": step["before"]["decoder"],
        "decoder_after": step["after"]["decoder"],
        **tokens,
    }
