"""What a run says when memory ends in spite of its plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from secateur.engine.memory_budget import SOLVE_LESS
from secateur.engine.plan import Plan
from secateur.errors import MemoryBudgetError

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


def largest_term(plan: Plan) -> Term:
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
        Term("distillation", plan.distilling_bytes, less_distillation(plan)),
    ]
    return max(terms, key=lambda term: term.nbytes)


def less_distillation(plan: Plan) -> str:
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
        term, gib = largest_term(plan), 2**30
        said = (str(error).strip() or "no memory").splitlines()[0]
        planned, free = plan.peak_bytes / gib, psutil.virtual_memory().available / gib
        raise MemoryBudgetError(
            f"memory has ended: {said}; the plan was {planned:.2f} GiB at most, and {free:.2f} GiB "
            "of the host are free now",
            where=f"{term.name} needs most, {term.nbytes / gib:.2f} GiB",
            remedy=f"close other programs, or {term.remedy}; then run again with --resume, which "
            "keeps finished layers",
        ) from error
