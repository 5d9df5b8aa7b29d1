"""Why a run leaves matrices as they are: nothing is skipped without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from secateur.engine.prune.run import Run
from secateur.models.inventory import Left, StoredMatrix, summary, weights_of

__all__ = ["left_by"]


def left_by(
    run: Run, matrices: Iterable[StoredMatrix], unreached: Collection[str] = ()
) -> list[Left]:
    """Every floating-point matrix of the model that the run does not prune, with its reason.

    Args:
        run: that will be, or was.
        matrices: all there are (`models.inventory`).
        unreached: linears of experts to which no calibration token was routed.
    """
    return summary(reasons(run, matrices, unreached))


def reasons(
    run: Run, matrices: Iterable[StoredMatrix], unreached: Collection[str]
) -> Iterator[tuple[str, str, int]]:
    """Name, reason and number of weights of every matrix that is not pruned."""
    unseen = run.inputs_unseen()
    matrices = list(matrices)
    yield from weights_of(matrices)
    for matrix in matrices:
        if matrix.linear is None:
            continue
        name = matrix.linear.name
        if run.sparsity_of[name] > 0:
            continue
        if name in unreached:
            reason = "no calibration token was routed to it"
        elif name in unseen:
            reason = "calibration cannot see its inputs"
        elif run.selection.asked(name, run.sparsity) == 0:
            reason = "left out by the recipe"
        else:
            reason = "the allocation takes nothing from it"
        yield matrix.name, reason, matrix.weights
