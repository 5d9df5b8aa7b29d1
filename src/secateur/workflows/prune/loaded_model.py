"""Pruning a loaded model in place, and the steps it shares with pruning a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.windows import check_fit, load_calibration
from secateur.engine.choose.survey import allocate
from secateur.engine.prune.leaving import left_by
from secateur.engine.prune.run import Run
from secateur.engine.prune.selection import Selection
from secateur.engine.prune.surgery import INPUT_STATISTICS, refuse_unusable
from secateur.engine.stream.gradients import gather_gradients
from secateur.engine.stream.targets import ModelTarget
from secateur.models.architecture import text_config
from secateur.models.experts import opened_experts
from secateur.models.inventory import StoredMatrix
from secateur.models.positions import positions_of
from secateur.models.skeleton import quiet_transformers
from secateur.models.tokenizer import start_tokens
from secateur.progress import Progress
from secateur.recipes.keywords import recipe_of
from secateur.recipes.prune import PruneRecipe
from secateur.reporting.results.prune import PruneResult
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import Allocation
from secateur.workflows.prune.distillation import distill_module, distills
from secateur.workflows.prune.prepare import (
    allocation_of,
    method_of,
    reconstruction_of,
    settings_of,
    window_plan,
    windows_needed,
)
from secateur.workflows.prune.self_generated_text import own_windows

__all__ = ["carry_out", "prune_module"]


def carry_out(run: Run, allocation: Allocation, done: int) -> None:
    """Gradients if the method needs them, the shares of the linears, then the layers."""
    if run.method.requires - INPUT_STATISTICS:
        assert run.windows is not None
        assert run.settings.work is not None
        assert run.passage is not None
        calls = run.passage.calls_of_one_window()
        gather_gradients(run.target, run.windows, calls, run.settings.work, run.progress)
    allocate(run, allocation)
    run.execute(done)


def prune_module(
    model: nn.Module,
    calibration: str | Path | Tensor | None,
    tokenizer: Any,
    progress: Progress,
    options: Mapping[str, Any],
) -> PruneResult:
    """Prune a loaded model in place."""
    named = None if isinstance(calibration, Tensor) else calibration
    recipe, _ = recipe_of(PruneRecipe, {"model": "loaded", "calibration": named}, options)
    method, sparsity = method_of(recipe)
    allocation = allocation_of(recipe, method)
    windows = None
    if windows_needed(recipe, method, allocation):
        windows = module_windows(recipe, calibration, tokenizer, model)
    ledger = Ledger()
    selection = Selection(recipe.include, recipe.exclude, recipe.overrides)
    needs_disk = method.requires - INPUT_STATISTICS or allocation.reach > 0
    scratch: Any = (
        tempfile.TemporaryDirectory(prefix="secateur-")
        if needs_disk
        else contextlib.nullcontext(None)
    )
    was_training = model.training
    model.eval()
    generated = recipe.calibration.generated_windows
    try:
        if windows is not None and generated:
            start = () if tokenizer is None else start_tokens(tokenizer)
            seed = recipe.calibration.seed
            own = own_windows(model, windows, generated, start, seed, progress)
            windows = torch.cat([windows, own])
        with opened_experts(model), scratch as folder, quiet_transformers():
            target = ModelTarget(model)
            refuse_unusable(target, progress)
            work = Path(folder) if folder else None
            settings = settings_of(recipe, "memory", work)
            run = Run(
                target,
                method,
                sparsity,
                selection,
                windows,
                settings,
                ledger,
                progress,
                reconstruction_of(recipe),
            )
            teacher = copy.deepcopy(model) if distills(recipe, run) else None
            carry_out(run, allocation, 0)
            if teacher is not None:
                distill_module(model, teacher, run, recipe, progress)
            unseen = [name for layer in ledger.layers for name in layer.get("unseen", ())]
            matrices = target.matrices()
            left = left_by(run, matrices, unseen)
            sparsity = decoder_sparsity(model, matrices)
    finally:
        model.train(was_training)
    return PruneResult(sparsity, ledger.layers, left=left)


def decoder_sparsity(model: nn.Module, matrices: Sequence[StoredMatrix]) -> float:
    """The fraction of zeros in the matrices of the decoder layers."""
    names = [matrix.name for matrix in matrices if matrix.is_decoder_matrix]
    weights = [model.get_parameter(name) for name in names]
    kept = sum(int(torch.count_nonzero(weight)) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    return 1 - kept / total if total else 0.0


def module_windows(
    recipe: PruneRecipe, calibration: str | Path | Tensor | None, tokenizer: Any, model: Any
) -> Tensor:
    """Calibration windows for a loaded model."""
    vocabulary, positions = text_config(model.config).vocab_size, positions_of(model.config)
    if isinstance(calibration, Tensor):
        check_fit(calibration, "calibration", vocab_size=vocabulary, positions=positions)
        return calibration.to("cpu", torch.int64)
    windows, _ = load_calibration(
        recipe.calibration.source,
        tokenizer,
        window_plan(recipe.calibration, model.config),
        field=recipe.calibration.field,
        vocab_size=vocabulary,
        positions=positions,
    )
    return windows
