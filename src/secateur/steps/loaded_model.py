"""Prunes a loaded model in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.run_windows import READY, RunWindows, WindowReader
from secateur.calibration.statistics import Gathering
from secateur.calibration.windows import check_fit
from secateur.engine.prepared import allocated
from secateur.engine.prune.checks import check_finite
from secateur.engine.prune.coverage import reach
from secateur.engine.prune.run import prune_layers
from secateur.engine.prune.tasks import Selection, Settings, skipped_matrices, tasks_of
from secateur.engine.stream.calls import layouts
from secateur.errors import ArchitectureError
from secateur.models.architecture import positions_of, refuse_foreign, text_config
from secateur.models.experts import opened_experts
from secateur.models.inventory import StoredMatrix
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import ModelTarget, refuse_all_zero, refuse_unknown
from secateur.models.tokenizer import start_tokens, tokenizer_for
from secateur.progress import Progress
from secateur.recipes.keywords import recipe_of, refuse_unused
from secateur.recipes.methods_of import allocation_of, method_of, own_methods, windows_needed
from secateur.recipes.prune import PruneRecipe
from secateur.reporting.models import PruneResult
from secateur.runs.ledger import Ledger
from secateur.training.distillation import DistillationData, Student, distill, pruned_layers

UNUSED = (
    *("output", "overwrite", "resume", "restart", "dry_run", "compress", "keep_format"),
    *("dtype", "device", "trust_remote_code", "max_memory", "activations"),
    *("must_keep", "must_keep_items", "task_data"),
    *("processes", "distill_sweep_windows", "distill_teacher"),
)
"""Options that a loaded model cannot use."""

OF_TEXT = ("field", "windows", "sequence_length", "packing")
"""Options that say how a text is cut into windows."""


def prune_module(
    model: nn.Module,
    calibration: str | Path | Iterable[str] | Tensor | None,
    tokenizer: Any,
    progress: Progress,
    options: Mapping[str, Any],
) -> PruneResult:
    """Prune a loaded model in place.

    Raises:
        SecateurError: as `prune`; an option needs a checkpoint, or weights are NaN or infinite.
    """
    refuse_unused(PruneRecipe, options, UNUSED, "a loaded model is pruned in place")
    if isinstance(calibration, Tensor):
        refuse_unused(PruneRecipe, options, OF_TEXT, "the calibration is a tensor of windows")
    _refuse_wrapped(model)
    named = {"calibration": None if isinstance(calibration, Tensor) else calibration}
    recipe, _ = recipe_of(PruneRecipe, {"model": "loaded", **named}, options)
    method, sparsity = method_of(recipe)
    allocation = allocation_of(recipe, method)
    check_finite(model.named_parameters())
    windows = None
    if windows_needed(recipe, method, allocation):
        ready = isinstance(calibration, Tensor) or recipe.calibration.source.endswith(READY)
        unneeded = ready and tokenizer is None
        tokenizer = None if unneeded else tokenizer_for(model, tokenizer)
        windows = _module_windows(recipe, calibration, tokenizer, model)
    ledger, how, was_training = Ledger(), recipe.distillation, model.training
    model.eval()
    try:
        if windows is not None and windows.ungenerated:
            start = () if tokenizer is None else start_tokens(tokenizer)
            windows = windows.generate(model, start, recipe.calibration.seed, progress)
        tokens = None if windows is None else windows.calibration
        with ExitStack() as stack, opened_experts(model), quiet_transformers():
            work = None
            if Gathering.of(method.requires).backward or allocation.reach > 0:
                work = Path(stack.enter_context(TemporaryDirectory(prefix="secateur-")))
            target = ModelTarget(model)
            refuse_all_zero(target)
            settings = Settings.of(recipe, "memory", work)
            refuse_unknown(target)
            found = () if tokens is None else layouts(target, tokens.shape[1])
            selection = Selection(recipe.include, recipe.exclude, recipe.overrides)
            own = own_methods(recipe)
            tasks = tasks_of(target, selection, method, sparsity, found, methods=own)
            teacher = copy.deepcopy(model) if how.epochs and pruned_layers(target, tasks) else None
            stream = None if tokens is None else settings.stream(target, tokens)
            shared = allocated(target, tasks, stream, settings, allocation, sparsity, progress)
            done = prune_layers(target, shared, stream, settings, ledger, progress)
            if teacher is not None and windows is not None:
                student = Student.of(model, target, done, pruned_layers(target, done))
                grid = any(weight.grid for weight in student.rounded.weights)
                data = DistillationData(windows.all, how, recipe.calibration.seed, on_grid=grid)
                distill(teacher, student, data, progress)
            reach(ledger.layers, (name for name, task in done.items() if task.changes))
            matrices = target.matrices()
            return PruneResult(
                sparsity=_decoder_sparsity(model, matrices),
                layers=ledger.layers,
                left=skipped_matrices(done, matrices),
            )
    finally:
        model.train(was_training)


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse what is no model, or a model in a wrapper: adapters, or what torch has compiled."""
    refuse_foreign(model)
    if hasattr(model, "_orig_mod"):
        raise ArchitectureError(
            "the model is compiled by torch.compile",
            remedy="prune the model itself (model._orig_mod), and compile it afterwards",
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ArchitectureError(
            "the model has adapters of peft, whose product would fill the zeros",
            remedy="merge them first: model = secateur.merge(model); or prune the base model, and "
            "train adapters on it",
        )


def _decoder_sparsity(model: nn.Module, matrices: Sequence[StoredMatrix]) -> float:
    """The fraction of zeros in the matrices of the decoder layers."""
    names = [matrix.name for matrix in matrices if matrix.is_decoder_matrix]
    weights = [model.get_parameter(name) for name in names]
    kept = sum(int(torch.count_nonzero(weight)) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    return 1 - kept / total if total else 0.0


def _module_windows(
    recipe: PruneRecipe, calibration: object, tokenizer: Any, model: Any
) -> RunWindows:
    """Calibration windows for a loaded model, and the extra ones of its distillation."""
    options = recipe.calibration
    if not isinstance(calibration, Tensor):
        reader = WindowReader(model.config, lambda: tokenizer)
        return RunWindows.cut(reader, options, recipe.distillation)
    vocabulary, positions = text_config(model.config).vocab_size, positions_of(model.config)
    check_fit(calibration, "calibration", vocab_size=vocabulary, positions=positions)
    windows = calibration.to("cpu", torch.int64)
    return RunWindows(windows, windows[:0], {}, options.generated_windows)
