"""Chooses the plan of a run that fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from secateur.engine.memory_budget import fitting_plan
from secateur.engine.plan import Plan, plan_run
from secateur.engine.prune.tasks import LinearTask
from secateur.parallel.ranks import ALONE, Ranks
from secateur.parallel.shares import micro_batches, rows_of
from secateur.recipes.memory import Memory
from secateur.workflows.prune.prepare import Prepared, settings_of

__all__ = ["choose_plan"]


def choose_plan(
    prepared: Prepared,
    tasks: Mapping[str, LinearTask],
    memory: Memory,
    ranks: Ranks = ALONE,
) -> tuple[Plan, str]:
    """Plan the run, with hidden states on disk if memory cannot hold them.

    With several processes this is the plan of one of them, except that the disk holds the hidden
    states of all.

    Returns:
        The plan, and `memory` or `disk`.

    Raises:
        MemoryBudgetError: the run exceeds the budget even with hidden states on disk.
        RecipeError: there are fewer calibration windows than processes.
    """

    def planned(windows: Tensor | None, activations: str) -> Plan:
        return plan_run(
            prepared.target,
            tasks,
            windows,
            settings_of(prepared.recipe, activations, None),
            prepared.recipe.distillation.epochs,
            prepared.allocation,
            prepared.output_bytes,
            prepared.unwritten,
        )

    every = own = prepared.planned_windows
    if every is not None and ranks.count > 1:
        at_once = max(1, memory.micro_batch_tokens // every.shape[1])
        batches = micro_batches(len(every), at_once, ranks.count)
        most = rows_of(0, batches, ranks.count)  # no process has more than the first
        own = every[: most[-1].stop]
    plan, activations = fitting_plan(
        lambda activations: planned(own, activations),
        prepared.target.device,
        budget_gib=memory.budget_gib,
        activations=memory.activations,
        sharing=ranks.here,
    )
    if own is not every:
        plan = replace(plan, disk_bytes=planned(every, activations).disk_bytes)
    return plan, activations
