"""Chooses the plan of a run that fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from secateur.engine.memory_budget import fitting_plan, memory_budget
from secateur.engine.plan import Plan, plan_run
from secateur.engine.prune.tasks import LinearTask
from secateur.errors import MemoryBudgetError
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.recipes.memory import Memory
from secateur.workflows.prune.prepare import Prepared, settings_of

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
    own = every if ranks.count == 1 else largest_share(every, memory, ranks)

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
        tell_of_sweeps(SWEEP_WINDOWS, planned(own, activations, 0).peak_bytes, budget)
    if own is not every:
        disk = planned(every, activations, plan.sweep_windows).disk_bytes
        plan = replace(plan, disk_bytes=disk)
    return plan, activations


def largest_share(windows: Tensor | None, memory: Memory, ranks: Ranks) -> Tensor | None:
    """The calibration windows of the first process; no other has more."""
    if windows is None:
        return None
    at_once = max(1, memory.micro_batch_tokens // windows.shape[1])
    batches = micro_batches(len(windows), at_once, ranks.count)
    return windows[: rows_of(0, batches, ranks.count)[-1].stop]


def tell_of_sweeps(size: int, whole: float, budget: float) -> None:
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
