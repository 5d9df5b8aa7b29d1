"""Why a run leaves matrices as they are: nothing is skipped without a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from secateur.engine.prune.tasks import Tasks
from secateur.models.inventory import Left, StoredMatrix, summary, weights_of

__all__ = ["left_by"]


def left_by(tasks: Tasks, matrices: Iterable[StoredMatrix]) -> list[Left]:
    """Every floating-point matrix of the model that a run does not prune, with the reason.

    Args:
        tasks: of a run that is planned, or was carried out.
        matrices: all there are (`models.inventory`).
    """
    return summary(reasons(tasks, matrices))


def reasons(tasks: Tasks, matrices: Iterable[StoredMatrix]) -> Iterator[tuple[str, str, int]]:
    """Name, reason and number of weights of every matrix that is not pruned."""
    matrices = list(matrices)
    yield from weights_of(matrices)
    for matrix in matrices:
        if matrix.linear is None:
            continue
        reason = tasks[matrix.linear.name].left
        if reason is not None:
            yield matrix.name, reason, matrix.weights
