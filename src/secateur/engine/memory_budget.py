"""The memory there is, of the host and of the device that computes, and plans that fit into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from secateur.engine.plan import Plan
from secateur.errors import MemoryBudgetError
from secateur.runs.meter import resident_bytes

__all__ = ["Budget", "fitting_plan", "memory_budget"]

FREE_SHARE = 0.8
"""Of the memory that is free, what a run may take when nobody says otherwise."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may have at its peak.

    Attributes:
        computing: where products run: on a GPU, or in this process.
        host: in this process, where a GPU computes; None where no GPU does.
    """

    computing: float
    host: float | None

    def shortage(self, computing: int, host: int) -> str | None:
        """What is too little for these peaks, in words with numbers; None if they fit.

        Args:
            computing: bytes at the peak where products run.
            host: bytes of this process at its peak; counts only where a GPU computes.
        """
        if self.host is None:
            return _short("", computing, self.computing)
        found = [_short(" on the GPU", computing, self.computing)]
        found.append(_short(" on the host", host, self.host))
        return "; ".join(x for x in found if x) or None


def _short(place: str, needed: int, budget: float) -> str | None:
    if needed <= budget:
        return None
    return f"{needed / 2**30:.2f} GiB{place}, the budget is {budget / 2**30:.2f} GiB"


def memory_budget(gib: float | None, device: torch.device) -> Budget:
    """What may be in use at the peak.

    Args:
        gib: for the device that computes: the memory of a GPU, or else of this process. None takes
            four fifths of what is free. The host of a GPU always has four fifths.
        device: that computes.
    """
    asked = gib * 2**30 if gib else None
    process = FREE_SHARE * (psutil.virtual_memory().available + resident_bytes())
    if device.type != "cuda":
        return Budget(asked or process, None)
    return Budget(asked or FREE_SHARE * torch.cuda.mem_get_info(device)[0], process)


def fitting_plan(
    planned: Callable[[str], Plan],
    device: torch.device,
    *,
    budget_gib: float | None,
    activations: str,
) -> tuple[Plan, str]:
    """The first of two plans that memory would hold, and where its hidden states wait.

    Args:
        planned: gives the plan with hidden states in `memory` or on `disk`.
        device: that computes.
        budget_gib: how much memory there may be; see `memory_budget`.
        activations: `memory` or `disk` allows that place only, `auto` both.

    Raises:
        MemoryBudgetError: neither fits the budget.
    """
    budget = memory_budget(budget_gib, device)
    tried = []
    for place in ("memory", "disk") if activations == "auto" else (activations,):
        plan = planned(place)
        shortage = budget.shortage(plan.peak_bytes, plan.host_peak_bytes)
        if shortage is None:
            return plan, place
        tried.append(
            f"with activations {'on disk' if place == 'disk' else 'in memory'}: {shortage}"
        )
    whole = max(plan.writing_bytes, plan.distilling_bytes)
    room = budget.computing - (0 if plan.on_gpu else plan.process_bytes)
    needed = f"the run needs more memory than there is; {'; '.join(tried)}"
    remedy = "lower --micro-batch-tokens, --windows or --sequence-length"
    if whole and whole > room:
        remedy = "leave out what needs the whole model (--distill-epochs 0 --generated-windows 0)"
    elif plan.solve_bytes > max(room, budget.computing / 2):
        out, columns = plan.solve_shape
        needed += (
            f", {plan.solve_bytes / 2**30:.2f} GiB of that to solve a {out} x {columns} linear"
        )
        remedy = (
            "prune without a gram (--method wanda), or leave the largest linears out (--exclude)"
        )
    raise MemoryBudgetError(needed, remedy=f"{remedy}, or raise --memory-budget-gib")
