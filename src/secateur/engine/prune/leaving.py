"""The reasons why a run does not prune some matrices. Nothing is skipped silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from secateur.engine.prune.tasks import Tasks
from secateur.models.inventory import Left, StoredMatrix, summary, weights_of


def left_by(tasks: Tasks, matrices: Iterable[StoredMatrix]) -> list[Left]:
    """Every floating-point matrix of the model that a run does not prune, with the reason.

    Args:
        tasks: tasks of a planned or finished run.
        matrices: all matrices of the model (`models.inventory`).
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
