"""Cutting structure: a model with fewer layers, heads, neurons, channels or experts.

plan in units ─► steps, each a smaller model ─► distillation by the uncut model ─► verified
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.calibration.continuation import PREFIX
from secateur.calibration.windows import load_calibration, load_windows
from secateur.engine.ledger import write_whole
from secateur.engine.meter import Meter
from secateur.engine.precision import fast_dtype
from secateur.engine.progress import Progress, Silent
from secateur.errors import RecipeError, VerificationError
from secateur.evaluation.step_time import StepTimer, time_steps
from secateur.models.architecture import text_config
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.models.skeleton import build_skeleton, stored_names
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.models.whole import load_whole
from secateur.recipes.reading import build_structure_recipe, dump_recipe, nested
from secateur.recipes.structure_schema import StructureRecipe
from secateur.reporting.manifest import MANIFEST_VERSION, environment
from secateur.reporting.structure_card import structure_card
from secateur.structured.accounting import Accounting, accounting
from secateur.structured.cut import Cut
from secateur.workflows.carrying import RUN_FOLDER, check_output, refuse_quantized
from secateur.workflows.distilling import learn
from secateur.workflows.latency_target import FILE, found_latency
from secateur.workflows.narrowing import check_width
from secateur.workflows.places import places
from secateur.workflows.preparing import choose_device, window_plan
from secateur.workflows.structure_bench import NOTES, Bench
from secateur.workflows.structure_plan import aim_of
from secateur.workflows.structure_stages import steps_of
from secateur.workflows.writing import with_written

log = logging.getLogger(__name__)

RECIPE, CALIBRATION = f"{RUN_FOLDER}/recipe.yaml", "calibration.json"

VARIED = (
    "no class of transformers has these sizes (layers that differ, or heads that do not divide the "
    "hidden size): the result loads once secateur is imported, or with trust_remote_code=True; "
    "other engines need --pad"
)

Read = tuple[Tensor, dict[str, Any]]
"""Calibration windows [samples, sequence_length], and where they are from."""

__all__ = ["StructureReport", "structure", "structure_recipe"]


@dataclass(frozen=True)
class StructureReport:
    """What a structured cut did.

    Attributes:
        manifest: choices, steps, cost and result.
        output: the folder written.
    """

    manifest: dict[str, Any]
    output: Path


def structure(
    model: str | Path,
    *,
    output: str | Path,
    calibration: str | Path = "c4",
    progress: Progress | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> StructureReport:
    """Cut structure out of a checkpoint, into a new and really smaller one.

    Args:
        model: hub id, folder, GGUF file or named sample.
        output: the folder to write.
        calibration: text by which it is chosen what goes.
        progress: told of every step.
        resume: go on with a stopped run to this output.
        restart: discard what a stopped run left.
        overwrite: replace an existing output folder.
        **options: keys of the recipe (`keep_layers`, `ffn`, `heads`, `keep_parameters`, …) and of
            its sections.

    Raises:
        SecateurError: what, where, and what to do.
    """
    values = {"model": str(model), "output": str(output), **nested(options)}
    values.setdefault("calibration", {}).setdefault("source", str(calibration))
    return structure_recipe(
        build_structure_recipe(values),
        progress or Silent(),
        resume=resume,
        restart=restart,
        overwrite=overwrite,
    )


def structure_recipe(
    recipe: StructureRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    timer: StepTimer = time_steps,
) -> StructureReport:
    """Carry out a recipe; all work happens in `OUTPUT.partial`, which is renamed at the end.

    Args:
        recipe: what is asked.
        progress: told of every step.
        resume: go on with a stopped run to this output.
        restart: discard what a stopped run left.
        overwrite: replace an existing output folder.
        timer: times a token, where the recipe has a target in time.

    Raises:
        SecateurError: what, where, and what to do.
    """
    meter = Meter.start()
    device = choose_device(recipe.device)
    source = resolve(recipe.model, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    refuse_quantized(source.folder)
    skeleton = build_skeleton(source.folder, trust_remote_code=recipe.trust_remote_code)
    aim = aim_of(recipe, skeleton)
    output, partial = places(
        recipe.output, RECIPE, resume=resume, restart=restart, overwrite=overwrite
    )
    check_output(source.folder, output)
    if resume:
        check_same(recipe, partial)
    check_width(recipe, aim, skeleton)
    work = partial / "work"
    text = None
    if not (resume and (work / CALIBRATION).exists()):
        text = read_calibration(recipe, source, skeleton.config)
    latency, file = None, work / FILE
    if recipe.decode_latency is not None:
        kept = file if resume else None
        latency = found_latency(recipe, aim, skeleton, device, timer, progress, kept)
        aim = replace(aim, joint=latency["joint"])
    if not resume:
        begin(recipe, partial)
    if latency is not None:
        write_whole(file, latency)
    windows, calibration = calibration_of(recipe, source, text, partial, progress)
    folder, steps = source.folder, []
    bench = Bench(recipe, aim, source.folder, windows, device, work, progress)
    for step in steps_of(recipe, aim, skeleton):
        folder, told = step.carry_out(bench, folder)
        steps.append(told)
    whole = work / "whole"
    PatchedCopy(CheckpointReader(folder), whole).create()
    (whole / NOTES).unlink(missing_ok=True)
    distilled = distil(recipe, source, whole, windows, device, work, progress)
    found = verified(skeleton, whole, steps, recipe)
    if found.varied:
        log.warning(VARIED)
    manifest = manifest_of(recipe, source, steps, distilled, calibration, found, meter, device)
    manifest["structure"]["latency"] = latency
    (partial / RUN_FOLDER / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    finish(recipe, manifest, source, whole, partial, output)
    return StructureReport(manifest, output)


def check_same(recipe: StructureRecipe, partial: Path) -> None:
    """Make sure that a stopped run was of this recipe.

    Raises:
        RecipeError: it had another one.
    """
    written = partial / RECIPE
    if written.read_text(encoding="utf-8") != dump_recipe(recipe):
        raise RecipeError(
            "the stopped run had another recipe",
            where=str(written),
            remedy="ask for the same as before, or discard it with --restart",
        )


def begin(recipe: StructureRecipe, partial: Path) -> None:
    """Make the partial folder, empty but for the recipe."""
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "work").mkdir(parents=True)
    written = partial / RECIPE
    written.parent.mkdir()
    written.write_text(dump_recipe(recipe), encoding="utf-8")


def read_calibration(recipe: StructureRecipe, source: LocalCheckpoint, config: Any) -> Read:
    """Calibration windows of the text, and where they are from."""
    options, tokenizer = recipe.calibration, None
    if not options.source.endswith(".safetensors"):
        tokenizer = load_tokenizer(source.folder, trust_remote_code=recipe.trust_remote_code)
    return load_calibration(
        options.source,
        tokenizer,
        window_plan(options, config),
        field=options.field,
        vocab_size=text_config(config).vocab_size,
    )


def calibration_of(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    text: Read | None,
    partial: Path,
    progress: Progress,
) -> Read:
    """The windows of the text, with those that the uncut model writes; kept for a run that goes on.

    Without a text they are those that were kept.
    """
    file, told = partial / RUN_FOLDER / "windows.safetensors", partial / "work" / CALIBRATION
    if text is None:
        return load_windows(file), json.loads(told.read_text(encoding="utf-8"))
    windows, provenance = text
    options = recipe.calibration
    if options.generated:
        windows = with_written(
            source.folder,
            windows,
            options.generated,
            options.seed,
            choose_device(recipe.device),
            progress,
            trust_remote_code=recipe.trust_remote_code,
        )
        provenance = {**provenance, "generated": options.generated, "generated_prefix": PREFIX}
    save_file({"input_ids": windows.contiguous()}, file)
    write_whole(told, provenance)
    return windows, provenance


def distil(
    recipe: StructureRecipe,
    source: LocalCheckpoint,
    whole: Path,
    windows: Tensor,
    device: torch.device,
    work: Path,
    progress: Progress,
) -> dict[str, float] | None:
    """Let the cut model learn from the uncut one, and write its decoder layers."""
    how, trust = recipe.distillation, recipe.trust_remote_code
    if not how.epochs:
        return None
    teacher = load_whole(source.folder, device, dtype=fast_dtype(device), trust_remote_code=trust)
    student = load_whole(whole, device, trust_remote_code=trust)
    reader = CheckpointReader(whole)
    stored = stored_names(student, reader)
    outside = {id(p) for p in student.get_input_embeddings().parameters()}
    outside |= {id(p) for p in student.get_output_embeddings().parameters()}
    trained = [
        name
        for name, p in student.named_parameters()
        if id(p) not in outside and p.is_floating_point() and p.numel()
    ]
    seed, saved = recipe.calibration.seed, work / "distillation"
    told = learn(student, teacher, trained, None, windows, how, seed, progress, saved)
    copy = PatchedCopy(reader, whole)
    for name in trained:
        copy.write(stored[name], student.get_parameter(name).detach())
    copy.sync()
    return told


def verified(
    skeleton: Any, whole: Path, steps: list[dict[str, Any]], recipe: StructureRecipe
) -> Accounting:
    """Count the model that was written, and hold it against what the steps say.

    Raises:
        VerificationError: it has another number of parameters.
    """
    made = build_skeleton(whole, trust_remote_code=recipe.trust_remote_code)
    before, after = accounting(skeleton, Cut()).before, accounting(made, Cut()).before
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
    """Everything worth knowing about a finished cut."""
    return {
        "manifest_version": MANIFEST_VERSION,
        "source": {"name": source.name, "kind": source.kind, "revision": source.revision},
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
        "calibration": dict(calibration),
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
    """A step without its lists of indices, which `steps.json` has."""
    return {
        "step": step["step"],
        "by": step.get("by", step.get("solver")),
        "decoder_before": step["before"]["decoder"],
        "decoder_after": step["after"]["decoder"],
    }


def finish(
    recipe: StructureRecipe,
    manifest: Mapping[str, Any],
    source: LocalCheckpoint,
    whole: Path,
    partial: Path,
    output: Path,
) -> None:
    """Bring notes and model together, and give the folder its name."""
    notes = partial / RUN_FOLDER
    (notes / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    card = structure_card(manifest, dump_recipe(recipe), source.folder)
    shutil.rmtree(whole / RUN_FOLDER, ignore_errors=True)
    (whole / "README.md").write_text(card, encoding="utf-8")
    for file in whole.iterdir():
        os.replace(file, partial / file.name)
    shutil.rmtree(partial / "work")
    if output.exists():
        shutil.rmtree(output)
    os.rename(partial, output)
