"""Prepares a run from a recipe: source, method, windows, and a plan that fits into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.continuation import PREFIX
from secateur.calibration.windows import EXTRA, Beside, load_windows, stored_extra
from secateur.engine.memory_budget import fitting_plan, memory_budget
from secateur.engine.plan import Plan, plan_run
from secateur.engine.prune.reconstruction import Reconstruction
from secateur.engine.prune.settings import Settings
from secateur.engine.prune.tasks import LinearTask, Selection, tasks_of
from secateur.engine.stream.layouts import layouts, refuse_unknown
from secateur.engine.stream.targets import CheckpointTarget, Target
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models.architecture import positions_of
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import CheckpointReader, copied_files
from secateur.models.copies import copy_of, weight_bytes_of
from secateur.models.opening import open_weights
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.shared import Memory
from secateur.runs.environment import choose_device
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.methods import Method
from secateur.workflows.prune.composition import allocation_of, method_of, own_methods
from secateur.workflows.run_windows import (
    beside_of,
    calibration_windows,
    extra_windows,
    log_short_text,
    split_extra,
    window_plan,
    with_generated_windows,
)


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that it names, opened and checked."""

    recipe: PruneRecipe
    source: LocalCheckpoint
    reader: CheckpointReader
    target: CheckpointTarget
    method: Method
    allocation: Allocation
    selection: Selection
    sparsity: float
    windows: Tensor | None
    calibration: dict[str, Any] | None
    unwritten: int = 0
    """Number of calibration windows that the dense model must still generate."""
    stored: bool = False
    """Whether the windows come from a stopped run."""
    methods: Mapping[str, Method] = field(default_factory=dict)
    """Methods that replace `method` for some linears, by glob."""
    costs: Mapping[str, int] = field(default_factory=dict)
    """The cost of one unit of a linear in an allocation's budget, by name."""
    beside: Beside | None = None
    """What the model reads beside the tokens of the windows, such as pictures."""
    extra: Tensor | None = None
    """Windows of the text that only the distillation reads."""

    @property
    def planned_windows(self) -> Tensor | None:
        """All windows of the run. Those with pictures or not generated yet are blank."""
        if self.windows is not None and self.beside is not None:
            return torch.zeros_like(self.windows)
        if self.windows is None or not self.unwritten:
            return self.windows
        blank = self.windows.new_zeros(self.unwritten, self.windows.shape[1])
        return torch.cat([self.windows, blank])

    @property
    def all_windows(self) -> Tensor:
        """The windows of the distillation: those of the calibration, and the extra ones."""
        assert self.windows is not None
        assert self.extra is not None
        return torch.cat([self.windows, self.extra])

    @property
    def output_bytes(self) -> int:
        """Size of the result's files."""
        weights = weight_bytes_of(self.reader, keep_format=self.recipe.keep_format)
        return weights + sum(f.stat().st_size for f in copied_files(self.reader.folder))


def settings_of(
    recipe: PruneRecipe, activations: str, work: Path | None, ranks: Ranks = ALONE
) -> Settings:
    """Return the settings for the work of a recipe.

    Raises:
        RecipeError: asymmetric fitting in the papers' order of work.
    """
    if recipe.asymmetric and recipe.sequential == "layer":
        raise RecipeError(
            "asymmetric fitting needs the inputs of each group as they are after the groups before "
            "it were pruned; in the order 'layer' they are not known",
            remedy="use --sequential group, or --symmetric",
        )
    return Settings(
        sequential=recipe.sequential,
        asymmetric=recipe.asymmetric,
        asymmetric_damping=recipe.asymmetric_damping,
        choose_damping=recipe.asymmetric and recipe.choose_damping,
        fast_matmuls=recipe.fast_matmuls,
        micro_batch_tokens=recipe.memory.micro_batch_tokens,
        activations=activations,
        work=work,
        on_collapse=recipe.on_collapse,
        reconstruction=_reconstruction_of(recipe),
        ranks=ranks,
    )


def _reconstruction_of(recipe: PruneRecipe) -> Reconstruction:
    """Return the tuning of pruned layers in a recipe."""
    how = recipe.reconstruction
    return Reconstruction(how.passes, how.learning_rate, how.remask)


def windows_needed(recipe: PruneRecipe, method: Method, allocation: Allocation) -> bool:
    """Whether any part of a recipe reads calibration tokens."""
    tuned = recipe.reconstruction.passes or recipe.distillation.epochs
    return bool(method.requires | allocation.requires or tuned or recipe.asymmetric)


def prepare(
    recipe: PruneRecipe,
    output: Path | None = None,
    stored_windows: Path | None = None,
    *,
    only_plan: bool = False,
    pictures: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Fetch, open and check everything that a recipe names. This writes no output.

    Args:
        recipe: the recipe.
        output: the folder of the patched copy; None to only plan.
        stored_windows: windows of an earlier run to reuse.
        only_plan: read no text; use blank windows of the recipe's number and length.
        pictures: whether the caller passes pictures; otherwise windows with pictures are refused.
        progress: receives the steps of a download, a conversion and the reading of the text.
    """
    progress = progress or Silent()
    method, sparsity = method_of(recipe)
    methods = own_methods(recipe)
    allocation = allocation_of(recipe, method)
    device = choose_device(recipe.device)
    source = resolve(
        recipe.model,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
    )
    reader = open_weights(source.folder)
    _refuse_dense_format(recipe, reader)
    target = CheckpointTarget(
        reader,
        copy_of(reader, output, keep_format=recipe.keep_format) if output else None,
        device,
        trust_remote_code=recipe.trust_remote_code,
    )
    refuse_unknown(target)
    prepared = Prepared(
        recipe,
        source,
        reader,
        target,
        method,
        allocation,
        Selection(recipe.include, recipe.exclude, recipe.overrides),
        sparsity,
        windows=None,
        calibration=None,
        methods=methods,
    )
    if not windows_needed(recipe, method, allocation):
        return prepared
    kept = stored_windows if stored_windows and stored_windows.exists() else None
    return _with_windows(prepared, kept, progress, only_plan=only_plan, pictures=pictures)


def _with_windows(
    prepared: Prepared, kept: Path | None, progress: Progress, *, only_plan: bool, pictures: bool
) -> Prepared:
    """Add the windows of a recipe, or those of an earlier run; see `prepare`."""
    recipe, target = prepared.recipe, prepared.target
    calibration: dict[str, Any] | None = None
    if kept is not None:
        windows = load_windows(kept, positions=positions_of(target.model.config))
        count = stored_extra(kept)
    else:
        progress.start("reading calibration text", 1)
        windows, calibration = _windows_of(recipe, prepared.source, target, only_plan, pictures)
        progress.finish()
        count = calibration.get(EXTRA, 0)
    windows, extra = split_extra(windows, count)
    beside = None
    if pictures:
        beside = beside_of(recipe, prepared.method, prepared.allocation, windows, kept)
    return replace(
        prepared,
        windows=windows,
        extra=extra,
        calibration=calibration,
        unwritten=0 if kept else recipe.calibration.generated_windows,
        stored=kept is not None,
        beside=beside,
    )


def _refuse_dense_format(recipe: PruneRecipe, reader: CheckpointReader) -> None:
    """Refuse to keep the format of a source that stores plain numbers, or to train in one."""
    if not recipe.keep_format:
        return
    if not isinstance(reader, AssembledReader):
        raise RecipeError(
            "the source stores plain numbers, and the result always has their dtypes",
            where="--keep-format",
            remedy="leave --keep-format out",
        )
    if recipe.distillation.epochs:
        raise RecipeError(
            "distillation changes all weights, which the format of the source would round again",
            where="--keep-format",
            remedy="leave --keep-format out, or do not distill",
        )


def _windows_of(
    recipe: PruneRecipe,
    source: LocalCheckpoint,
    target: Target,
    only_plan: bool,
    pictures: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the calibration windows of a recipe, the extra ones at the end, and their source."""
    plan = window_plan(recipe.calibration, target.model.config)
    asked = extra_windows(plan, recipe.calibration, recipe.distillation)
    windows, record = calibration_windows(
        recipe.calibration.source,
        recipe.calibration,
        source.folder,
        target,
        extra=asked,
        trust_remote_code=recipe.trust_remote_code,
        only_plan=only_plan,
        pictures=pictures,
    )
    log_short_text(asked, record)
    return windows, record


def fingerprint(windows: Tensor | None) -> str | None:
    """A digest of the calibration tokens."""
    if windows is None:
        return None
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


def tasks_for(prepared: Prepared) -> dict[str, LinearTask]:
    """Return the task of each linear in the run of a prepared recipe.

    Raises:
        RecipeError, PatternError, ShapeError: a glob matches nothing, a matrix does not fit.
    """
    windows = prepared.windows
    return tasks_of(
        prepared.target,
        prepared.selection,
        prepared.method,
        prepared.sparsity,
        () if windows is None else layouts(prepared.target, windows.shape[1]),
        methods=prepared.methods,
        costs=prepared.costs,
    )


def shared_inputs(prepared: Prepared, tasks: Mapping[str, LinearTask]) -> list[tuple[str, ...]]:
    """The full names of linears that share an input. Without text, each linear is alone."""
    windows, target = prepared.windows, prepared.target
    if windows is None:
        return [(name,) for name in tasks]
    return [
        tuple(f"{target.architecture.layer_name(index)}.{name}" for name in group)
        for index, layout in enumerate(layouts(target, windows.shape[1]))
        for group in layout.groups
    ]


log = logging.getLogger(__name__)

SWEEP_WINDOWS = 16
"""Number of windows in a sweep of the distillation, where the whole model does not fit."""


def choose_plan(
    prepared: Prepared,
    tasks: Mapping[str, LinearTask],
    memory: Memory,
    ranks: Ranks = ALONE,
    sweep_windows: int | None = None,
) -> tuple[Plan, str]:
    """Plan the run, with hidden states on disk if memory cannot hold them.

    A distillation has both whole models in memory if they fit, else one layer, in sweeps over
    `SWEEP_WINDOWS` windows. The log says when it takes sweeps, and why.

    Args:
        prepared: the run.
        tasks: the task of each linear.
        memory: the budget.
        ranks: the processes that share the work.
        sweep_windows: number of windows in a sweep; 0 for both whole models, None to choose.

    With several processes this is the plan of one of them, except that the disk holds the hidden
    states of all.

    Returns:
        The plan, and `memory` or `disk`.

    Raises:
        MemoryBudgetError: the run exceeds the budget even with hidden states on disk.
        RecipeError: there are fewer calibration windows than processes.
    """

    def planned(windows: Tensor | None, activations: str, sweep_windows: int) -> Plan:
        return plan_run(
            prepared.target,
            tasks,
            windows,
            settings_of(prepared.recipe, activations, None),
            prepared.recipe.distillation.epochs,
            prepared.allocation,
            prepared.output_bytes,
            prepared.unwritten,
            sweep_windows,
            0 if prepared.extra is None else prepared.extra.numel(),
        )

    every = prepared.planned_windows
    own = every if ranks.count == 1 else _largest_share(every, memory, ranks)

    def fitting(sweep_windows: int) -> tuple[Plan, str]:
        return fitting_plan(
            lambda activations: planned(own, activations, sweep_windows),
            prepared.target.device,
            max_memory=memory.max_bytes,
            activations=memory.activations,
            sharing=ranks.here,
        )

    distillation = prepared.recipe.distillation
    if sweep_windows is None:
        sweep_windows = distillation.sweep_windows
    try:
        plan, activations = fitting(sweep_windows or 0)
    except MemoryBudgetError:
        if sweep_windows is not None or not distillation.epochs:
            raise
        plan, activations = fitting(SWEEP_WINDOWS)
        budget = memory_budget(memory.max_bytes, prepared.target.device, ranks.here).computing
        log_sweeps(SWEEP_WINDOWS, planned(own, activations, 0).peak_bytes, budget)
    if own is not every:
        disk = planned(every, activations, plan.sweep_windows).disk_bytes
        plan = replace(plan, disk_bytes=disk)
    return plan, activations


def _largest_share(windows: Tensor | None, memory: Memory, ranks: Ranks) -> Tensor | None:
    """The calibration windows of the first process; no other has more."""
    if windows is None:
        return None
    at_once = max(1, memory.micro_batch_tokens // windows.shape[1])
    batches = micro_batches(len(windows), at_once, ranks.count)
    return windows[: rows_of(0, batches, ranks.count)[-1].stop]


def log_sweeps(size: int, whole: float, budget: float) -> None:
    """Log that a distillation takes sweeps, and why.

    Args:
        size: number of windows in a sweep.
        whole: peak bytes with both whole models.
        budget: bytes of the device that computes.
    """
    log.warning(
        "distilling with one decoder layer in memory, in sweeps of %d windows: with both whole "
        "models the peak is %.2f GiB, the budget %.2f GiB",
        size,
        whole / 2**30,
        budget / 2**30,
    )


def with_own_windows(prepared: Prepared, progress: Progress) -> Prepared:
    """Add the windows that the dense model must generate for the recipe.

    The whole model is in memory while it generates, and is freed afterwards.
    """
    assert prepared.windows is not None
    assert prepared.calibration is not None
    windows = with_generated_windows(
        prepared.source.folder,
        prepared.windows,
        prepared.unwritten,
        prepared.recipe.calibration.seed,
        prepared.target.device,
        progress,
        trust_remote_code=prepared.recipe.trust_remote_code,
    )
    told = {"generated": prepared.unwritten, "generated_prefix": PREFIX}
    calibration = {**prepared.calibration, **told}
    return dataclasses.replace(prepared, windows=windows, unwritten=0, calibration=calibration)
