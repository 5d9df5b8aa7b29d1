"""What a run needs in memory, the memory that is there, and plans that fit into it.

A plan is a list of needs. Each need belongs to phases of the run, and the peak is the largest
phase. If memory ends in spite of its plan, the error names the largest need (`explained`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from secateur.errors import MemoryBudgetError, RecipeError
from secateur.runs.environment import resident_bytes

PLACES = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}
FREE_SHARE = 0.8
"""The default fraction of free memory that a run may use."""
NAMED_NEEDS, NAMED_SHARE = 3, 0.05
"""An error names so many needs of a phase: each at least this part of it."""


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: what happens in it.
        on_host: whether it counts the memory of this process while a GPU computes. Other phases
            count the memory of the computing device: of the GPU, or else of this process.
    """

    name: str
    on_host: bool = False


@dataclass(frozen=True)
class Need:
    """Memory that a run needs in some of its phases.

    Attributes:
        name: its key in JSON. Two needs with one name are one thing in two places.
        bytes: its size.
        phases: when it is there.
        text: what needs it.
        remedy: the options that make it smaller; empty if none does.
    """

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """The needs of a run.

    Attributes:
        needs: everything that takes memory.
        on_gpu: whether a GPU computes with its own memory.
        disk_bytes: the maximum disk use.
    """

    needs: tuple[Need, ...]
    on_gpu: bool
    disk_bytes: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name of the need: on the computing device, if it is in two places."""
        return {need.name: need.bytes for need in self.needs}

    @property
    def phases(self) -> dict[Phase, int]:
        """The memory of each phase in bytes. Without a GPU no phase is on its host."""
        found = Counter[Phase]()
        for need in self.needs:
            there = (phase for phase in need.phases if self.on_gpu or not phase.on_host)
            found.update(dict.fromkeys(there, need.bytes))
        return found

    @property
    def peak_bytes(self) -> int:
        """The estimated peak memory of the computing device: the GPU, or this process."""
        return max(size for phase, size in self.phases.items() if not phase.on_host)

    @property
    def host_peak_bytes(self) -> int:
        """The estimated peak memory of this process."""
        return max(size for phase, size in self.phases.items() if phase.on_host == self.on_gpu)

    def to_json(self) -> dict[str, Any]:
        """All figures of the memory."""
        peaks = {"peak": self.peak_bytes, "host_peak": self.host_peak_bytes}
        return {**peaks, **self.sizes, "on_gpu": self.on_gpu}


@dataclass(frozen=True)
class Budget:
    """The maximum number of bytes that a run may use.

    Attributes:
        computing: for the computing device: a GPU, or this process.
        host: for this process if a GPU computes; None without a GPU.
    """

    computing: float
    host: float | None

    def shortage(self, plan: Plan) -> str | None:
        """Describe with numbers which memory is too small for a plan. None if it fits."""
        if self.host is None:
            return _short("", plan.peak_bytes, self.computing)
        found = [_short(" on the GPU", plan.peak_bytes, self.computing)]
        found.append(_short(" on the host", plan.host_peak_bytes, self.host))
        return "; ".join(x for x in found if x) or None

    def refusal(self, plan: Plan, what: str) -> MemoryBudgetError:
        """The error for a plan that does not fit, with all phases that are too large.

        Args:
            plan: the plan.
            what: the first part of the message.
        """
        remedies: dict[str, None] = {}
        for phase, size in plan.phases.items():
            limit = self.host if phase.on_host and self.host is not None else self.computing
            if size > limit:
                needs = sorted(
                    (x for x in plan.needs if phase in x.phases), key=lambda need: -need.bytes
                )
                large = [x for x in needs if x.bytes > NAMED_SHARE * size][:NAMED_NEEDS]
                parts = ", ".join(f"{need.text} {need.bytes / 2**30:.2f}" for need in large)
                what += f"; {phase.name} takes {size / 2**30:.2f} GiB, most of it: {parts}"
                avoidable = [x for x in needs if x.remedy]
                if size - sum(x.bytes for x in avoidable) <= limit:  # else no remedy is enough
                    remedies |= dict.fromkeys([x.remedy for x in avoidable][:NAMED_NEEDS])
        less = "; ".join(remedies)
        return MemoryBudgetError(what, remedy=f"{less}{less and '; or '}raise --max-memory")


def _short(place: str, needed: int, budget: float) -> str | None:
    if needed <= budget:
        return None
    return f"{needed / 2**30:.2f} GiB{place}, the budget is {budget / 2**30:.2f} GiB"


def memory_budget(most: int | None, device: torch.device, sharing: int = 1) -> Budget:
    """Return the memory that a run may use at its peak.

    Args:
        most: bytes of the computing device: of a GPU, or else of this process. None takes four
            fifths of the free memory. The host of a GPU always uses four fifths.
        device: the computing device.
        sharing: number of processes that share the host. Each has a GPU of its own.
    """
    free = psutil.virtual_memory().available / sharing
    process = FREE_SHARE * (free + resident_bytes())
    if device.type != "cuda":
        return Budget(most or process, None)
    return Budget(most or FREE_SHARE * torch.cuda.mem_get_info(device)[0], process)


AnyPlan = TypeVar("AnyPlan", bound=Plan)


def fitting_plan(
    planned: Callable[[str], AnyPlan],
    device: torch.device,
    *,
    max_memory: int | None,
    activations: str,
    sharing: int = 1,
) -> tuple[AnyPlan, str]:
    """Return the first plan that fits in memory, and the storage of its hidden states.

    Args:
        planned: returns the plan with hidden states on the `gpu`, in `memory` or on `disk`.
        device: the computing device.
        max_memory: bytes; see `memory_budget`.
        activations: allows only that storage; `auto` all that the device has.
        sharing: number of processes that share the host.

    Raises:
        MemoryBudgetError: no plan fits the budget.
        RecipeError: hidden states are to be on a GPU, and a CPU computes.
    """
    if activations == "gpu" and device.type != "cuda":
        raise RecipeError(
            f"hidden states cannot be on a GPU, because {device} computes",
            where="--activations",
            remedy="use auto, memory or disk; or compute on a GPU with --device cuda",
        )
    budget = memory_budget(max_memory, device, sharing)
    tried = []
    places = ("gpu", "memory", "disk") if device.type == "cuda" else ("memory", "disk")
    for place in places if activations == "auto" else (activations,):
        plan = planned(place)
        shortage = budget.shortage(plan)
        if shortage is None:
            return plan, place
        tried.append(f"with activations {PLACES[place]}: {shortage}")
    needed = f"the run needs more memory than there is; {'; '.join(tried)}"
    raise budget.refusal(plan, needed)


SAYINGS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's allocators put it where they raise a plain RuntimeError."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory of the processor or of a GPU has ended."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error).lower() for x in SAYINGS)


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Turn the end of memory into an error that names the largest need of the plan.

    Raises:
        MemoryBudgetError: memory has ended inside the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        need, gib = max((x for x in plan.needs if x.remedy), key=lambda need: need.bytes), 2**30
        why = (str(error).strip() or "no memory").splitlines()[0]
        planned, free = plan.peak_bytes / gib, psutil.virtual_memory().available / gib
        raise MemoryBudgetError(
            f"memory has ended: {why}; the plan was {planned:.2f} GiB at most, and {free:.2f} GiB "
            "of the host are free now",
            where=f"{need.text} needs most, {need.bytes / gib:.2f} GiB",
            remedy=f"close other programs, or {need.remedy}; then run again with --resume, which "
            "keeps finished layers",
        ) from error
