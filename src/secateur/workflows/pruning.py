"""Pruning, from a recipe to a checked folder, or of a loaded model in place."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.diagnostics.audit import Audit, audit_checkpoint, verify
from secateur.engine.leaving import left_by
from secateur.engine.ledger import Ledger
from secateur.engine.meter import Meter
from secateur.engine.plan import Plan
from secateur.engine.progress import Progress, Silent
from secateur.engine.routing import coverage
from secateur.engine.run import Run, Settings
from secateur.engine.survey import settled_allocation
from secateur.errors import RecipeError
from secateur.recipes.reading import build_recipe, dump_recipe, nested
from secateur.recipes.schema import PruneRecipe
from secateur.reporting.manifest import MANIFEST_VERSION, environment
from secateur.reporting.model_card import model_card
from secateur.reporting.prune_report import PruneReport
from secateur.workflows.distilling import distil_checkpoint
from secateur.workflows.in_place import carry_out, prune_module
from secateur.workflows.places import places
from secateur.workflows.preparing import (
    Prepared,
    check_disk,
    choose_plan,
    fingerprint,
    prepare,
    reconstruction_of,
    settings_of,
)
from secateur.workflows.writing import with_own_windows

LEDGER = "secateur/layers.jsonl"

__all__ = ["PruneReport", "plan", "plan_recipe", "prune", "run_prepared", "run_recipe"]

NO_PART = {"output", "memory", "calibration", "on_collapse"}
"""Fields of a recipe that the pruned weights do not depend on, or that are told in another way."""


def plan(model: str, **options: Any) -> Plan:
    """What pruning `model` would need, without doing it; the options are those of `prune`.

    Raises:
        SecateurError: as `prune` would.
    """
    return plan_recipe(build_recipe({"model": model, **nested(options)}))[0]


def plan_recipe(recipe: PruneRecipe) -> tuple[Plan, str]:
    """The plan of a recipe, and where its hidden states would wait."""
    prepared = prepare(recipe, only_plan=True)
    # refuses what does not fit
    run = run_of(prepared, settings_of(recipe, "memory", None), Ledger(None, {}), Silent())
    chosen, activations = choose_plan(prepared, recipe.memory)
    return replace(chosen, left=left_by(run, prepared.target.matrices())), activations


def prune(
    model: str | Path | nn.Module,
    *,
    output: str | Path | None = None,
    calibration: str | Path | Tensor = "c4",
    tokenizer: Any = None,
    progress: Progress | None = None,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> PruneReport:
    """Prune a model: a checkpoint into a new folder, or a loaded module in place.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        output: the folder to write; required for a checkpoint, refused for a module.
        calibration: text, or token windows [samples, sequence_length] for a module.
        tokenizer: needed for a module when `calibration` is text.
        progress: told of every step.
        resume: go on with a stopped run to this output.
        restart: discard what a stopped run left.
        overwrite: replace an existing output folder.
        **options: keys of the recipe (`method`, `sparsity`, `pattern`, `scope`, `include`, …) and
            of its calibration section (`samples`, `sequence_length`, `seed`, `packing`, `field`).

    Returns:
        What was done.

    Raises:
        SecateurError: what, where, and what to do.
    """
    if isinstance(model, nn.Module):
        if output is not None:
            raise RecipeError(
                "a loaded model is pruned in place; `output` is for checkpoints",
                remedy="call model.save_pretrained(output) afterwards",
            )
        return prune_module(model, calibration, tokenizer, progress or Silent(), options)
    if output is None:
        raise RecipeError("`output` is missing: the folder for the pruned model")
    if isinstance(calibration, Tensor):
        raise RecipeError(
            "token windows as a tensor are for loaded models",
            remedy="save them with secateur.calibration.windows.save_windows and pass the file",
        )
    values = {"model": str(model), "output": str(output), **nested(options)}
    values.setdefault("calibration", {}).setdefault("source", str(calibration))
    return run_recipe(
        build_recipe(values),
        progress or Silent(),
        resume=resume,
        restart=restart,
        overwrite=overwrite,
    )


def run_of(prepared: Prepared, settings: Settings, ledger: Ledger, progress: Progress) -> Run:
    """The run a prepared recipe describes; checks every matrix against the pattern."""
    return Run(
        prepared.target,
        prepared.method,
        prepared.sparsity,
        prepared.selection,
        prepared.windows,
        settings,
        ledger,
        progress,
        reconstruction_of(prepared.recipe),
        prepared.patterns,
        prepared.costs,
    )


def run_recipe(
    recipe: PruneRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> PruneReport:
    """Prune a checkpoint into a new folder.

    All work happens in `OUTPUT.partial`, which becomes OUTPUT by one rename when everything is
    written and verified.

    Args:
        recipe: the recipe.
        progress: told of every step.
        resume: go on with a run that was stopped.
        restart: discard what a stopped run left.
        overwrite: replace an existing output folder.
    """
    meter = Meter.start()
    _, partial = places(recipe.output, LEDGER, resume=resume, restart=restart, overwrite=overwrite)
    stored = partial / "secateur" / "windows.safetensors" if resume else None
    prepared = prepare(recipe, partial, stored)
    return run_prepared(prepared, progress, meter, resume=resume, overwrite=overwrite)


def run_prepared(
    prepared: Prepared,
    progress: Progress,
    meter: Meter,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> PruneReport:
    """Carry out a recipe that is prepared; its places were checked."""
    recipe = prepared.recipe
    assert recipe.output is not None
    output = Path(recipe.output)
    partial = output.with_name(output.name + ".partial")
    chosen, activations = choose_plan(prepared, recipe.memory)
    check_disk(chosen, output)
    prepared = with_own_windows(prepared, progress)
    work = partial / "work"
    settings = settings_of(recipe, activations, work)
    ledger = Ledger(partial / "secateur" / "layers.jsonl", identity(prepared))
    run = run_of(prepared, settings, ledger, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.calibration.seed)
        carry_out(run, prepared.allocation, begin(prepared, ledger, partial, resume))
        distilled = distil_checkpoint(prepared, run, partial, progress)
    audit = audit_checkpoint(
        partial,
        lambda name: run.method_for(name).pattern,
        run.sparsity_of,
        trust_remote_code=recipe.trust_remote_code,
    )
    verify(audit)
    manifest = make_manifest(prepared, chosen, activations, audit, meter, resume)
    manifest["distillation"] = distilled
    found = coverage(ledger.layers, run.target.architecture)
    manifest["experts"] = found and found.to_json()
    left = left_by(run, prepared.target.matrices(), found.unseen if found else ())
    manifest["left"] = [one.to_json() for one in left]
    manifest["collapsed"] = [n for layer in ledger.layers for n in layer.get("collapsed", ())]
    finish(manifest, prepared, partial, output, overwrite)
    return PruneReport(audit.sparsity, ledger.layers, manifest, output, left)


def identity(prepared: Prepared) -> dict[str, Any]:
    """Everything the pruned weights depend on."""
    recipe = prepared.recipe.model_dump(mode="json", exclude=NO_PART)
    return {
        **recipe,
        "micro_batch_tokens": prepared.recipe.memory.micro_batch_tokens,
        "windows": fingerprint(prepared.windows),
        "starts": dict(prepared.selection.starts),
        "patterns": {glob: pattern.name for glob, pattern in prepared.patterns.items()},
        "source_files": [[f.name, f.stat().st_size] for f in prepared.reader.files],
    }


def begin(prepared: Prepared, ledger: Ledger, partial: Path, resume: bool) -> int:
    """Make the partial folder, or go on with it; returns how many layers are done."""
    if resume:
        return ledger.resume()
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "work").mkdir(parents=True)
    (partial / "secateur").mkdir()
    assert prepared.target.output is not None
    prepared.target.output.create()
    if prepared.windows is not None:
        save_file(
            {"input_ids": prepared.windows.contiguous()},
            partial / "secateur" / "windows.safetensors",
        )
    source = json.dumps(prepared.calibration)
    (partial / "secateur" / "calibration.json").write_text(source, encoding="utf-8")
    ledger.begin()
    return 0


def make_manifest(
    prepared: Prepared, plan: Plan, activations: str, audit: Audit, meter: Meter, resumed: bool
) -> dict[str, Any]:
    """Everything worth knowing about a finished run."""
    partial = prepared.target.output.folder  # type: ignore[union-attr]
    method = prepared.method
    return {
        "manifest_version": MANIFEST_VERSION,
        "source": {
            "name": prepared.source.name,
            "kind": prepared.source.kind,
            "revision": prepared.source.revision,
        },
        "family": audit.family,
        "method": {
            "name": method.name,
            "score": repr(method.score),
            "solver": repr(method.solver),
            "pattern": method.pattern.name,
            "scope": method.pattern.scope,
            "refinement": repr(method.refinement) if method.refinement else None,
            "effort": prepared.recipe.effort,
            "sequential": prepared.recipe.sequential,
            "asymmetric": prepared.recipe.asymmetric,
            "fast_matmuls": prepared.recipe.fast_matmuls,
            "reconstruction": prepared.recipe.reconstruction.model_dump(),
            "distillation": prepared.recipe.distillation.model_dump(),
            "asked_sparsity": prepared.sparsity,
        },
        "allocation": describe_allocation(prepared, partial / "work"),
        "calibration": json.loads((partial / "secateur" / "calibration.json").read_text()),
        "calibration_digest": fingerprint(prepared.windows),
        "environment": environment(prepared.target.device),
        "plan": {**plan.to_json(), "activations": activations},
        "cost": {**meter.read(), "resumed": resumed},
        "result": {
            "decoder_sparsity": audit.sparsity,
            "model_sparsity": audit.model_sparsity,
            "parameters": audit.parameters,
            "file_bytes": audit.file_bytes,
        },
    }


def describe_allocation(prepared: Prepared, work: Path) -> dict[str, Any]:
    """Which allocation was used, the range of sparsities it gave, and what a search measured."""
    told = {"name": prepared.recipe.allocation, "parameters": repr(prepared.allocation)}
    settled = settled_allocation(work)
    if not settled.exists():
        return told
    found = json.loads(settled.read_text())
    shares = found.pop("sparsity_of").values()
    return {**told, "lowest_sparsity": min(shares), "highest_sparsity": max(shares), **found}


def finish(
    manifest: dict[str, Any], prepared: Prepared, partial: Path, output: Path, overwrite: bool
) -> None:
    """Write recipe, manifest and card, clear the work folder, and give the folder its name."""
    recipe_yaml = dump_recipe(prepared.recipe)
    notes = partial / "secateur"
    (notes / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
    (notes / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    card = model_card(manifest, recipe_yaml, prepared.source.folder)
    (partial / "README.md").write_text(card, encoding="utf-8")
    (notes / "calibration.json").unlink()
    shutil.rmtree(partial / "work")
    if overwrite and output.exists():
        shutil.rmtree(output)
    os.rename(partial, output)
