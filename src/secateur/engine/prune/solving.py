"""Linears are solved: those that share an input one by one, those of experts many at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.calibration.statistics import GroupStatistics
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks, linear_bytes
from secateur.errors import NumericalError, located
from secateur.models.architecture import Linear
from secateur.parallel.ranks import ALONE, Ranks
from secateur.sparsity.solvers import Solution
from secateur.types import STORED, Statistics

AT_ONCE_BYTES = {"cpu": 16 * 2**20, "cuda": 4 * 2**30}
"""The memory for solving linears of several experts at once. On a GPU a batch saves launches. On a
processor it saves little, and only where it stays in the caches."""


class Solved(NamedTuple):
    """Linears that were solved at once, all with the same task but for the name.

    Attributes:
        linears: one, or the same linear of some experts.
        numbers: of their groups.
        weight: what was pruned in place of their own weights, [out, in] or [batch, out, in].
        statistics: of their inputs.
        solution: the result.
    """

    linears: list[Linear]
    numbers: list[int]
    weight: Tensor
    statistics: Statistics
    solution: Solution


@dataclass(frozen=True)
class Solving:
    """Solves the linears for which statistics were gathered together.

    Attributes:
        group: what was gathered, complete.
        values: the values that the linears of a group share.
        weights_of: the weights to prune in place of linears' own, [linears, out, in].
        own_of: the statistics that a linear has for itself.
        tasks: the tasks of the linears.
        wanted: names of the linears to solve.
        settings: how the work is done.
        ranks: the processes that solve each linear together.
    """

    group: GroupStatistics
    values: Statistics
    weights_of: Callable[[Sequence[Linear]], Tensor]
    own_of: Callable[[Linear], Mapping[str, Tensor]]
    tasks: Tasks
    wanted: Collection[str]
    settings: Settings
    ranks: Ranks = ALONE

    def statistics(self, numbers: int | list[int]) -> Statistics:
        """The statistics of the input of a group, or of some groups of a batch."""
        if not self.group.batch:
            return self.values
        return {name: x[numbers] for name, x in self.values.items()}

    def together(self) -> Iterator[list[int]]:
        """The numbers of the groups that are solved at once: of experts, as many as fit.

        Linear by linear, they have the same method and sparsity.
        """
        alike: dict[object, list[int]] = {}
        for number in range(len(self.group.groups)):
            if wanted := self._wanted(number):
                kinds = ((place, x.method, x.sparsity) for place, x in wanted.items())
                alike.setdefault(tuple(kinds), []).append(number)
        for numbers in alike.values():
            device = self.group.groups[numbers[0]][0].weight.device
            tasks = self._wanted(numbers[0]).values()
            fit = min(solved_at_once(task, self.settings, device) for task in tasks)
            step = fit if self.group.batch else 1
            yield from (numbers[start : start + step] for start in range(0, len(numbers), step))

    def _wanted(self, number: int) -> dict[int, LinearTask]:
        """The tasks of the linears of a group that are solved, by their places in it."""
        linears = enumerate(self.group.groups[number])
        return {i: self.tasks[x.name] for i, x in linears if x.name in self.wanted}

    def solve(self, numbers: list[int]) -> Iterator[Solved]:
        """Score → mask → solve, for some groups at once; for one where a part takes no batches."""
        first, tasks = self.group.groups[numbers[0]], self._wanted(numbers[0])
        batched = self.group.batch and all(task.method.batched for task in tasks.values())
        statistics = self.statistics(numbers if batched else numbers[0])
        method = next(iter(tasks.values())).method  # the others differ only in the pattern
        try:
            with located(first[0].name):
                prepared = method.prepare(statistics, self.ranks)
            for place, task in tasks.items():
                linears = [self.group.groups[number][place] for number in numbers]
                weight = self.weights_of(linears)
                stored = {STORED} & task.method.score.requires
                every = [{**self.own_of(x), **dict.fromkeys(stored, x.weight)} for x in linears]
                own = {name: torch.stack([x[name] for x in every]) for name in every[0]}
                if not batched:
                    weight, own = weight[0], every[0]
                known = {**statistics, **own}
                with located(task.name):
                    found = task.method.solve(weight, prepared, known, task.sparsity, self.ranks)
                yield Solved(linears, numbers, weight, statistics, found)
        except NumericalError:
            for number in numbers if len(numbers) > 1 else []:
                list(self.solve([number]))  # the one at fault has a name
            raise


def solved_at_once(task: LinearTask, settings: Settings, device: torch.device) -> int:
    """The number of experts for which a linear is solved at once: as many as fit, at least one."""
    if not task.method.batched:
        return 1
    each = linear_bytes(task, asymmetric=settings.asymmetric)
    return max(1, AT_ONCE_BYTES[device.type] // each)


def at_once_bytes(
    tasks: Tasks, settings: Settings, device: torch.device, of_expert: Callable[[str], bool]
) -> int:
    """The memory for the linears of experts that are solved at once; 0 without experts."""
    changed = [task for name, task in tasks.items() if task.changes and of_expert(name)]
    kinds = Counter((task.shape, task.method, task.sparsity) for task in changed)
    found = 0
    for task in {(x.shape, x.method, x.sparsity): x for x in changed}.values():
        count = min(
            kinds[task.shape, task.method, task.sparsity], solved_at_once(task, settings, device)
        )
        found = max(found, count * linear_bytes(task, asymmetric=settings.asymmetric))
    return found
