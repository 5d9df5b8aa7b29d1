"""The memory for solving, as declared by the parts.

`tests/engine/prune/test_solver_cost.py` compares every solver's memory with its declaration, on
grams that float32 can factorise and on grams that need float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.calibration.statistics import statistics
from secateur.engine.prune.tasks import (
    LinearTask,
    Tasks,
    gradient_statistics,
    input_statistics,
)
from secateur.engine.stream.kinds import LayerLayout
from secateur.engine.stream.targets import Target
from secateur.models.architecture import linears_of
from secateur.types import float32_bytes

TARGET_SQUARES = 6
"""Maximum number of float32 matrices [in, in] in `dense_target`, besides the gram."""
HELD_TARGETS = 2
"""Number of these matrices that stay while the linears of a group are solved."""


@dataclass(frozen=True)
class SolveMemory:
    """The memory for solving one linear, with its statistics: of the linear that takes most.

    Attributes:
        most: bytes at worst.
        usual: bytes where float32 is enough for every factorisation.
        shape: (out, in) of the linear that takes `most`.
    """

    most: int = 0
    usual: int = 0
    shape: tuple[int, int] = (0, 0)


def solve_bytes(tasks: Tasks, *, asymmetric: bool, held_out: bool = False) -> SolveMemory:
    """Return the maximum memory for solving one linear.

    Args:
        tasks: tasks of the run. Tasks that change nothing need no memory.
        asymmetric: whether linears are fitted to the dense model.
        held_out: whether held-out tokens choose the damping.
    """
    needs = {
        (linear_bytes(task, asymmetric=asymmetric, held_out=held_out), task.shape, task.method)
        for task in tasks.values()
        if task.changes
    }
    if not needs:
        return SolveMemory()
    most, shape, _ = max(needs, key=lambda need: need[:2])
    usual = max(size - method.fallback_bytes(own) for size, own, method in needs)
    return SolveMemory(most, usual, shape)


def linear_bytes(task: LinearTask, *, asymmetric: bool, held_out: bool = False) -> int:
    """The memory for solving one linear, with the statistics of its inputs.

    With held-out tokens there are statistics of both parts, and copies of them while they are used.
    """
    names = input_statistics({task.name: task}, asymmetric=asymmetric)
    held = sum(statistics[name].nbytes(task.shape) for name in names)
    working = task.method.working_bytes(task.shape)
    if asymmetric:
        square = float32_bytes((task.shape[1], task.shape[1]))
        working = max(TARGET_SQUARES * square, working + HELD_TARGETS * square)
    if held_out:
        held *= 4
        working += HELD_TARGETS * float32_bytes((task.shape[1], task.shape[1]))
        working += float32_bytes(task.shape)
    return held + working


def gradient_bytes(tasks: Tasks) -> int:
    """The memory of the statistics of all gradients."""
    names = gradient_statistics(tasks)
    return sum(statistics[name].nbytes(t.shape) for name in names for t in tasks.values())


def statistics_bytes(target: Target, found: Sequence[LayerLayout], names: Iterable[str]) -> int:
    """The memory of input statistics for all groups of a layer; large with many experts."""
    largest = 0
    for layer, layout in zip(target.layers, found, strict=True):
        linears = linears_of(layer, "")
        shapes = [linears[group[0]].shape for group in layout.groups]
        held = sum(statistics[name].nbytes(shape) for name in names for shape in shapes)
        largest = max(largest, held)
    return largest
