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
from secateur.parallel.ranks import ALONE, Ranks
from secateur.parallel.shares import micro_batches, rows_of
from secateur.recipes.memory import Memory
from secateur.workflows.prune.prepare import Prepared, settings_of

__all__ = ["choose_plan"]

log = logging.getLogger(__name__)

BLOCK_LAYERS = 4
"""Decoder layers of a block, where the whole model does not fit."""


def choose_plan(
    prepared: Prepared,
    tasks: Mapping[str, LinearTask],
    memory: Memory,
    ranks: Ranks = ALONE,
    block_layers: int | None = None,
) -> tuple[Plan, str]:
    """Plan the run, with hidden states on disk if memory cannot hold them.

    A distillation takes the whole model if that fits, else blocks of `BLOCK_LAYERS` layers. The
    log says when it takes blocks, and why.

    Args:
        prepared: the run.
        tasks: the task of each linear.
        memory: the budget.
        ranks: the processes that share the work.
        block_layers: how many layers a block has; 0 for the whole model, None to choose.

    With several processes this is the plan of one of them, except that the disk holds the hidden
    states of all.

    Returns:
        The plan, and `memory` or `disk`.

    Raises:
        MemoryBudgetError: the run exceeds the budget even with hidden states on disk.
        RecipeError: there are fewer calibration windows than processes.
    """

    def planned(windows: Tensor | None, activations: str, block_layers: int) -> Plan:
        return plan_run(
            prepared.target,
            tasks,
            windows,
            settings_of(prepared.recipe, activations, None),
            prepared.recipe.distillation.epochs,
            prepared.allocation,
            prepared.output_bytes,
            prepared.unwritten,
            block_layers,
            0 if prepared.extra is None else prepared.extra.numel(),
        )

    every = prepared.planned_windows
    own = every if ranks.count == 1 else largest_share(every, memory, ranks)

    def fitting(block_layers: int) -> tuple[Plan, str]:
        return fitting_plan(
            lambda activations: planned(own, activations, block_layers),
            prepared.target.device,
            budget_gib=memory.budget_gib,
            activations=memory.activations,
            sharing=ranks.here,
        )

    distillation = prepared.recipe.distillation
    if block_layers is None:
        block_layers = distillation.block_layers
    try:
        plan, activations = fitting(block_layers or 0)
    except MemoryBudgetError:
        if block_layers is not None or not distillation.epochs:
            raise
        plan, activations = fitting(BLOCK_LAYERS)
        budget = memory_budget(memory.budget_gib, prepared.target.device, ranks.here).computing
        tell_of_blocks(plan, planned(own, activations, 0), budget)
    if own is not every:
        disk = planned(every, activations, plan.block_layers).disk_bytes
        plan = replace(plan, disk_bytes=disk)
    return plan, activations


def largest_share(windows: Tensor | None, memory: Memory, ranks: Ranks) -> Tensor | None:
    """The calibration windows of the first process; no other has more."""
    if windows is None:
        return None
    at_once = max(1, memory.micro_batch_tokens // windows.shape[1])
    batches = micro_batches(len(windows), at_once, ranks.count)
    return windows[: rows_of(0, batches, ranks.count)[-1].stop]


def tell_of_blocks(plan: Plan, whole: Plan, budget: float) -> None:
    """Log that a distillation takes blocks, and why.

    Args:
        plan: with blocks.
        whole: with both whole models.
        budget: bytes of the device that computes.
    """
    log.warning(
        "distilling in blocks of %d decoder layers, with a peak of %.2f GiB: with both whole "
        "models the peak is %.2f GiB, the budget %.2f GiB",
        plan.block_layers,
        plan.peak_bytes / 2**30,
        whole.peak_bytes / 2**30,
        budget / 2**30,
    )
