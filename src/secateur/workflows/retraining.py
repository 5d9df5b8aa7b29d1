"""Training a checkpoint with its zeros held, by its text or by a teacher, into a run folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from secateur.diagnostics.audit import audit_checkpoint
from secateur.engine.meter import Meter
from secateur.engine.progress import Progress, Silent
from secateur.engine.targets import CheckpointTarget
from secateur.errors import NumericalError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.recipes.reading import dump_recipe, validated
from secateur.recipes.training_schema import DistillRecipe, RetrainRecipe
from secateur.reporting.manifest import environment
from secateur.reporting.training_card import training_card
from secateur.reporting.training_report import TrainingReport
from secateur.training.batches import Batches
from secateur.training.door import Door
from secateur.training.gradual import GradualPruning
from secateur.training.loop import Loop, Outcome
from secateur.training.masks import Masks
from secateur.training.sharing import load
from secateur.workflows.adapting import adapt
from secateur.workflows.carrying import (
    RUN_FOLDER,
    carry_over,
    check_output,
    read_config,
    refuse_quantized,
)
from secateur.workflows.masking import masks_of
from secateur.workflows.places import places
from secateur.workflows.preparing import choose_device
from secateur.workflows.teaching import objective_of, plan_of, teacher_of
from secateur.workflows.trained_weights import check_written, full_disk_named, write_trained
from secateur.workflows.training_memory import (
    TrainingMemory,
    check_disk,
    check_memory,
    disk_bytes,
    foretell,
)
from secateur.workflows.training_text import TrainingText, read_training_text

__all__ = ["distill", "retrain", "run_training"]

NO_PART = {
    "output",
    "device",
    "save_minutes",
    "learning_rate",
    "teacher_file",
    "tensorboard",
    "memory_budget_gib",
}
"""Fields that a stopped training may be gone on with differently. The learning rate is one: a
training that diverged goes on from its last save with a lower one."""

OUTDATED = ("evaluation.json", "diagnosis.json", "bench.json", "compression.json")
"""Notes of what was measured of the weights before."""


def retrain(
    model: str | Path,
    *,
    output: str | Path,
    progress: Progress | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TrainingReport:
    """Train a checkpoint on text, its zeros held at every step, into a new folder.

    Args:
        model: hub id, folder or named sample.
        output: the folder to write.
        progress: told of every step.
        resume: go on with a stopped training to this output.
        restart: discard what a stopped training left.
        overwrite: replace an existing output folder.
        **options: the other fields of `secateur.recipes.training_schema.RetrainRecipe`: `text`,
            `steps` or `minutes`, `learning_rate`, `validation`, …

    Raises:
        SecateurError: what, where, and what to do.
    """
    values = {"model": str(model), "output": str(output), **options}
    recipe = validated(RetrainRecipe, values, None)
    return run_training(recipe, progress, resume=resume, restart=restart, overwrite=overwrite)


def distill(
    model: str | Path,
    *,
    output: str | Path,
    teacher: str | Path | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TrainingReport:
    """Let a pruned or cut checkpoint learn from a larger one; as `retrain` otherwise.

    Args:
        model: the student: hub id, folder or named sample.
        output: the folder to write.
        teacher: who is learned from; the model that was pruned, if None.
        progress: told of every step.
        resume: go on with a stopped training to this output.
        restart: discard what a stopped training left.
        overwrite: replace an existing output folder.
        **options: the other fields of `secateur.recipes.training_schema.DistillRecipe`: those of
            `retrain`, and `kind`, `temperature`, `hidden`, `top_k`, …

    Raises:
        SecateurError: what, where, and what to do.
    """
    values = {"model": str(model), "output": str(output), **options}
    values |= {} if teacher is None else {"teacher": str(teacher)}
    recipe = validated(DistillRecipe, values, None)
    return run_training(recipe, progress, resume=resume, restart=restart, overwrite=overwrite)


@full_disk_named
def run_training(
    recipe: RetrainRecipe,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> TrainingReport:
    """Train as a recipe says.

    All work happens in `OUTPUT.partial`, which becomes OUTPUT by one rename when everything is
    written and looked at. In several processes the first one writes, and all return.

    Args:
        recipe: of a retraining or a distillation.
        progress: told of every step.
        resume: go on with a training that was stopped.
        restart: discard what a stopped training left.
        overwrite: replace an existing output folder.
    """
    meter = Meter.start()
    door = Door(choose_device(recipe.device))
    progress = progress if progress is not None and door.main else Silent()
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code)
    refuse_quantized(source.folder)
    output, partial = places(
        recipe.output, "work", "training", resume=resume, restart=restart, overwrite=overwrite
    )
    check_output(source.folder, output)
    work = begin(partial, door, resume)
    trust = recipe.trust_remote_code
    reader = CheckpointReader(source.folder)
    target = CheckpointTarget(reader, None, door.device, trust_remote_code=trust)
    text = read_training_text(recipe, source.folder, target.model.config)
    plan = plan_of(recipe, text)
    teacher = teacher_of(recipe, source, work)
    memory = foretell(recipe, target, teacher, text, plan, door)
    check_memory(memory, recipe, door.device)
    check_disk(disk_bytes(recipe, target, text, plan), partial)
    dtype = torch.float32 if door.ranks > 1 else None
    model = load(source.folder, door, dtype=dtype, trust_remote_code=trust)
    masks = masks_of(recipe, model, door)
    objective = objective_of(recipe, source, teacher, model, text, work, progress, door)
    adapted = adapt(recipe, model, masks, text.windows, door)
    loop = Loop(
        adapted.model,
        Batches(text.windows, recipe.batch, recipe.seed),
        objective,
        adapted.held,
        plan,
        validation=text.validation,
        saved=work,
        hooks=adapted.hooks,
        progress=progress,
        door=door,
        identity=identity(recipe, source, text),
        board=Path(recipe.tensorboard) if recipe.tensorboard else None,
    )
    with quiet_transformers(), log_kept(loop):
        outcome = loop.run()
    manifest = manifest_of(recipe, source, text, loop, outcome, meter, memory)
    if door.main:
        write(recipe, source, adapted.masks, manifest, partial)
    door.wait()
    check_written(partial, adapted.masks, trust_remote_code=trust)
    door.wait()
    if door.main:
        if output.exists():
            shutil.rmtree(output)
        os.rename(partial, output)
    door.wait()
    return report_of(output, outcome, manifest)


def begin(partial: Path, door: Door, resume: bool) -> Path:
    """The folder that a training works in, made by the main process; the others wait for it."""
    door.wait()
    work = partial / "work"
    if door.main:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    door.wait()
    return work


def report_of(output: Path, outcome: Outcome, manifest: dict[str, Any]) -> TrainingReport:
    """What a training did, for whoever asked for it."""
    result = manifest["result"]
    return TrainingReport(
        output,
        result.get("decoder_sparsity", 0.0),
        outcome.step,
        outcome.tokens,
        result["perplexity_before"],
        result["perplexity_after"],
        manifest,
    )


def identity(recipe: RetrainRecipe, source: LocalCheckpoint, text: TrainingText) -> dict[str, Any]:
    """Everything the trained weights depend on."""
    return {
        **recipe.model_dump(mode="json", exclude=NO_PART),
        "tokens": text.record["sha256"],
        "source_files": [
            [f.name, f.stat().st_size] for f in sorted(source.folder.glob("*.safetensors"))
        ],
    }


# -- what is left behind -------------------------------------------------------------------------


@contextmanager
def log_kept(loop: Loop) -> Iterator[None]:
    """Say where the log of a training that went wrong lies, and how it can go on."""
    try:
        yield
    except NumericalError as error:
        log = loop.saved.log.file
        raise NumericalError(
            error.what,
            where=error.where,
            remedy=f"{error.remedy}; from the last save with --resume and a lower "
            f"--learning-rate. `secateur diagnose --training-log {log}` reads the log",
        ) from error


def manifest_of(
    recipe: RetrainRecipe,
    source: LocalCheckpoint,
    text: TrainingText,
    loop: Loop,
    outcome: Outcome,
    meter: Meter,
    memory: TrainingMemory,
) -> dict[str, Any]:
    """Everything worth knowing about a finished training."""
    validations = [[step, math.exp(loss)] for step, loss in outcome.validations]
    rates = [line["learning_rate"] for line in outcome.log]
    verb, objective = "retrain", "next token"
    if isinstance(recipe, DistillRecipe):
        verb, objective = "distill", f"{recipe.kind} KL, T = {recipe.temperature:g}"
        if recipe.next_token:
            part = recipe.next_token
            objective = f"{1 - part:g} of {objective}, {part:g} of next token"
        if recipe.hidden:
            objective += f", {recipe.hidden:g} of hidden states"
    if recipe.lora is not None:
        objective += f", adapters of rank {recipe.lora.rank}"
    if recipe.gradual is not None:
        kept = {
            n: m for x in loop.hooks if isinstance(x, GradualPruning) for n, m in x.kept.items()
        }
        objective += f", pruned on the way to {Masks(kept).sparsity:.0%}"
    return {
        "verb": verb,
        "source": {"name": source.name, "kind": source.kind, "revision": source.revision},
        "objective": objective,
        "text": text.record,
        "learning_rate": max(rates, default=0.0),
        "optimizer": type(loop.optimizer).__name__,
        "processes": loop.door.ranks,
        "recipe": recipe.model_dump(mode="json"),
        "environment": environment(loop.device),
        "planned": memory.to_json(),
        "cost": {**meter.read(), "training_seconds": outcome.seconds},
        "result": {
            **{k: v for k, v in outcome.facts().items() if k not in ("validations", "best_kept")},
            "perplexities": validations,
            "perplexity_before": validations[0][1] if validations else None,
            "perplexity_after": math.exp(outcome.best_loss) if validations else None,
        },
    }


def write(
    recipe: RetrainRecipe,
    source: LocalCheckpoint,
    masks: Masks,
    manifest: dict[str, Any],
    partial: Path,
) -> None:
    """Write the model and its notes."""
    write_trained(recipe, source.folder, masks, partial)
    carry_over(source.folder, partial, read_config(source.folder))
    notes = partial / RUN_FOLDER
    notes.mkdir(exist_ok=True)
    for name in OUTDATED:
        (notes / name).unlink(missing_ok=True)
    manifest["result"]["decoder_sparsity"] = audit_checkpoint(
        partial, trust_remote_code=recipe.trust_remote_code
    ).sparsity
    trainings = notes / "training.json"
    before = json.loads(trainings.read_text(encoding="utf-8")) if trainings.is_file() else []
    trainings.write_text(json.dumps([*before, manifest], indent=2), encoding="utf-8")
    shutil.copyfile(partial / "work" / "log.jsonl", notes / "training.jsonl")
    recipe_yaml = dump_recipe(recipe)
    (notes / "training.yaml").write_text(recipe_yaml, encoding="utf-8")
    card = training_card(manifest, recipe_yaml, source.folder)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(partial / "work")
