"""What a run checks: finite weights, zeros after every solution, outputs that have collapsed.

A linear has collapsed when it has lost four fifths of the energy of its output, a relative error
of 0.9. Solvers that repair weights measure that error. For solvers that only set weights to zero,
the norms of the inputs give an estimate that assumes uncorrelated inputs (`layer.lost_energy`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from secateur.engine.prune.tasks import COLLAPSED, LinearTask, Tasks
from secateur.errors import NumericalError, VerificationError
from secateur.models.architecture import Linear
from secateur.models.checkpoint import not_finite
from secateur.runs.records import LinearRecord
from secateur.sparsity.patterns import misplaced

_OWN_FAULT = "this is a fault in secateur or in a plug-in; please report it"


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights in memory that are NaN or infinite.

    Raises:
        NumericalError: there are such values; the message names the tensor and their number.
    """
    for name, tensor in tensors:
        if bad := not_finite(tensor):
            raise NumericalError(
                f"{bad} of {tensor.numel()} weights are NaN or infinite",
                where=name,
                remedy="the model is damaged: load or make it again",
            )


def counted_zeros(
    linears: Sequence[Linear], task: LinearTask, mask: Tensor
) -> list[tuple[int, int]]:
    """Compare the stored zeros of solved linears with the number that their pattern requires.

    Args:
        linears: the linears; they have the same shape, method and sparsity.
        task: the task of one of them.
        mask: of each.

    Returns:
        How many weights each mask removes, and how many are zero.

    Raises:
        VerificationError: there are fewer zeros.
        NumericalError: a weight is NaN or infinite.
    """
    expected = task.method.pattern.pruned(task.shape, task.sparsity)
    stored = [x.weight for x in linears]
    nonzero = torch.stack([torch.count_nonzero(x) for x in stored])
    # Of good weights the sum is finite.
    finite = torch.stack([x.sum(dtype=torch.float32).isfinite() for x in stored])
    kept = mask.sum((-2, -1)).reshape(-1)
    found = []
    for linear, counts in zip(
        linears, torch.stack([kept, nonzero, finite], 1).tolist(), strict=True
    ):
        pruned, zeros = (linear.weight.numel() - count for count in counts[:2])
        if pruned != expected or zeros < expected:  # the source may have zeros of its own
            raise VerificationError(
                f"{linear.name} should have {expected} zeros; the mask has {pruned}, the weight "
                f"{zeros}",
                where=linear.name,
                remedy=_OWN_FAULT,
            )
        if not counts[2]:
            check_finite([(f"{linear.name}.weight", linear.weight)])
        found.append((pruned, zeros))
    return found


def check_zeros(layer: nn.Module, linears: Iterable[Linear], tasks: Tasks) -> None:
    """Check where the zeros of every matrix are. A run does so in the first layer of each kind.

    So a fault that affects every layer of a kind ends the run early.

    Raises:
        VerificationError: a weight is not zero where the pattern needs a zero.
    """
    for linear in linears:
        task = tasks[linear.name]
        missing = misplaced(task.method.pattern, linear.weight, task.sparsity)
        if missing:
            raise VerificationError(
                f"{missing} of {linear.weight.numel()} weights are not zero and should be, "
                f"at sparsity {task.sparsity:g} in the pattern {task.method.pattern.name}; this is "
                f"the first {type(layer).__name__} of its kind, and no layer behind it was worked "
                "on",
                where=f"{linear.name}.weight",
                remedy=f"{_OWN_FAULT}, and leave the matrix out: --exclude '{linear.name}'",
            )


def collapsed(records: Sequence[LinearRecord], tasks: Tasks) -> dict[str, float]:
    """The collapsed linears, with their lost energy.

    A linear whose task removes all its columns has not collapsed: its block is gone on purpose.
    """
    lost = {}
    for record in records:
        share = record.lost if record.error is None else record.error
        whole = tasks[record.name].method.pattern.whole_units
        removed = whole and record.pruned == record.shape[0] * record.shape[1]
        # an error that is not a number counts as the largest
        if share is not None and not share <= COLLAPSED and not removed:
            lost[record.name] = share
    return lost
