"""The available memory of the host and the computing device, and plans that fit into it.

If memory ends in spite of its plan, the error names the largest part of the plan (`explained`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from secateur.engine.plan import Plan
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.runs.environment import resident_bytes

SOLVE_LESS = "prune without a gram (--method wanda), or leave the largest linears out (--exclude)"
"""The remedy where a solver needs too much."""

PLACES = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}
FREE_SHARE = 0.8
"""The default fraction of free memory that a run may use."""


@dataclass(frozen=True)
class Budget:
    """The maximum number of bytes that a run may use.

    Attributes:
        computing: for the computing device: a GPU, or this process.
        host: for this process if a GPU computes; None without a GPU.
    """

    computing: float
    host: float | None

    def shortage(self, computing: int, host: int) -> str | None:
        """Describe with numbers which memory is too small for these peaks. None if they fit.

        Args:
            computing: peak bytes of the computing device.
            host: peak bytes of this process; counts only if a GPU computes.
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


def fitting_plan(
    planned: Callable[[str], Plan],
    device: torch.device,
    *,
    max_memory: int | None,
    activations: str,
    sharing: int = 1,
) -> tuple[Plan, str]:
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
        shortage = budget.shortage(plan.peak_bytes, plan.host_peak_bytes)
        if shortage is None:
            return plan, place
        tried.append(f"with activations {PLACES[place]}: {shortage}")
    whole = max(plan.writing_bytes, plan.distilling_bytes)
    room = budget.computing - (0 if plan.on_gpu else plan.process_bytes)
    needed = f"the run needs more memory than there is; {'; '.join(tried)}"
    remedy = "lower --micro-batch-tokens, --windows or --sequence-length"
    if whole and whole > room:
        remedy = f"leave out what needs the whole model ({_too_large(plan, room)})"
    elif plan.solve_bytes > max(room, budget.computing / 2):
        out, columns = plan.solve_shape
        needed += (
            f", {plan.solve_bytes / 2**30:.2f} GiB of that to solve a {out} x {columns} linear"
        )
        remedy = SOLVE_LESS
    raise MemoryBudgetError(needed, remedy=f"{remedy}, or raise --max-memory")


def _too_large(plan: Plan, room: float) -> str:
    """The options that leave out what needs more than this memory."""
    options = {
        "--distill-epochs 0": plan.distilling_bytes,
        "--generated-windows 0": plan.writing_bytes,
    }
    return " ".join(option for option, size in options.items() if size > room)


SAYINGS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's allocators put it where they raise a plain RuntimeError."""


@dataclass(frozen=True)
class Term:
    """A part of the planned memory.

    Attributes:
        name: what needs it.
        nbytes: how much.
        remedy: the option that makes it smaller.
    """

    name: str
    nbytes: int
    remedy: str


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory of the processor or of a GPU has ended."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error).lower() for x in SAYINGS)


def _largest_term(plan: Plan) -> Term:
    """The part of a plan that needs most memory."""
    out, columns = plan.solve_shape
    terms = [
        Term("a decoder layer", plan.layer_bytes, "use --dtype bfloat16"),
        Term("hidden states", plan.activation_bytes, "use --activations disk"),
        Term(
            "forwards of a micro-batch",
            plan.forward_bytes + plan.waiting_bytes,
            "halve --micro-batch-tokens",
        ),
        Term(
            f"solving a {out} x {columns} linear",
            plan.solve_bytes,
            SOLVE_LESS,
        ),
        Term("tuning a layer", plan.tuning_bytes, "use --tune-passes 0"),
        Term("generating windows", plan.writing_bytes, "use --generated-windows 0"),
        Term("distillation", plan.distilling_bytes, _less_distillation(plan)),
    ]
    return max(terms, key=lambda term: term.nbytes)


def _less_distillation(plan: Plan) -> str:
    """The option that makes a distillation smaller."""
    return "use --distill-epochs 0" if plan.sweep_windows else "use --distill-sweep-windows 16"


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Turn the end of memory into an error that names the largest term of the plan.

    Raises:
        MemoryBudgetError: memory has ended inside the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        term, gib = _largest_term(plan), 2**30
        why = (str(error).strip() or "no memory").splitlines()[0]
        planned, free = plan.peak_bytes / gib, psutil.virtual_memory().available / gib
        raise MemoryBudgetError(
            f"memory has ended: {why}; the plan was {planned:.2f} GiB at most, and {free:.2f} GiB "
            "of the host are free now",
            where=f"{term.name} needs most, {term.nbytes / gib:.2f} GiB",
            remedy=f"close other programs, or {term.remedy}; then run again with --resume, which "
            "keeps finished layers",
        ) from error
