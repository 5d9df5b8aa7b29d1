"""One pass through the dense model, for an allocation: it observes each layer and keeps a little.

Calibration passes through the dense model layer by layer, with one layer in memory. The allocation
stores values of each layer: a number for each linear, its scores, or its weights at several
levels. Each layer has one file, so a killed run resumes after the last file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import ForwardSource, Gathering, GroupStatistics
from secateur.engine.prune.coverage import is_reached, refuse_unreached
from secateur.engine.prune.layer import Gathered, Solving
from secateur.engine.prune.tasks import LinearTask, Settings, Tasks, gathering
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.halted_forwards import batches_of, by_layer
from secateur.engine.stream.layerwise import stored_gradients
from secateur.errors import located
from secateur.models.architecture import Linear, linears_of
from secateur.models.targets import Target, walk_layers
from secateur.progress import Progress
from secateur.runs.output import write_tensors
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.methods import Method
from secateur.sparsity.patterns import pruned_count
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.types import STORED

Linears = Mapping[str, Linear]
"""The linears of a decoder layer, by their names in it."""

Shared = Mapping[str, tuple[GroupStatistics, int]]
"""The statistics that have the input of a linear, and the number of its group among them."""


def grains_of(tasks: Tasks, allocation: Allocation) -> dict[str, Granularity]:
    """The step size and the limit of the sparsity of every competing linear.

    With the global scope, the counts of the linears add up to the number of units that is nearest
    to the sparsity of the whole model.
    """
    grains, seen = {}, 0
    for name, task in tasks.items():
        if task.sparsity <= 0 or task.fixed:
            continue
        pattern, shape, asked = task.method.pattern, task.shape, task.sparsity
        pruned, step = pattern.pruned(shape, asked), pattern.step(shape)
        if pattern.scope == "global":
            # rounded sums, and their differences: no count is off by more than a unit in all
            units = shape[0] * shape[1] // step
            before, seen = seen, seen + units
            counts = [pruned_count(total, asked) for total in (before, seen)]
            pruned = (counts[1] - counts[0]) * step
        grain = Granularity.around(shape, step, pruned, asked, allocation.reach)
        grains[name] = grain if task.cost is None else grain._replace(weights=task.cost)
    return grains


def uniform_if_equal(task: LinearTask, share: float) -> float:
    """The uniform sparsity of a task if it prunes as many weights as `share`, else `share`."""
    pattern, shape, asked = task.method.pattern, task.shape, task.sparsity
    return asked if pattern.pruned(shape, asked) == pattern.pruned(shape, share) else share


@dataclass(frozen=True)
class Survey:
    """One pass through the whole dense model, layer by layer, for an allocation.

    Attributes:
        target: the model.
        tasks: the tasks of the linears before the allocation.
        calibration: the calibration stream; None without calibration.
        settings: how the work is done.
        progress: receives every step.
    """

    target: Target
    tasks: Tasks
    calibration: CalibrationStream | None
    settings: Settings
    progress: Progress

    @property
    def work(self) -> Path:
        """The folder for the files."""
        assert self.settings.work is not None
        return self.settings.work

    def statistics_for(self, allocation: Allocation) -> Mapping[str, ForwardSource]:
        """The statistics of inputs that an allocation needs for its own work, and for the run's."""
        needed = set(allocation.requires)
        for task in self.tasks.values():
            needed |= task.method.score.requires if "score" in allocation.uses else set()
            needed |= task.method.requires if "solver" in allocation.uses else set()
        return Gathering.of(needed).forward

    @torch.no_grad()
    def execute(self, allocation: Allocation, grains: Mapping[str, Granularity]) -> list[Path]:
        """Pass every layer to the allocation. Return one file for each layer."""
        count, device = len(self.target.layers), self.target.device
        files = [self.work / f"survey-{i:04d}.safetensors" for i in range(count)]
        names, ranks = self.statistics_for(allocation), self.settings.ranks
        # the first file that does not exist
        start = ranks.once(lambda: next((i for i, x in enumerate(files) if not x.exists()), count))
        if start == count:
            return files
        # without statistics of inputs no token passes, and layers are only read
        opened = self.calibration.open(start) if names and self.calibration else None
        if opened is not None:
            start, walk, steps = opened.start, opened.walk(), len(opened.batches())
        else:
            walk, steps = walk_layers(self.target, range(start, count)), 1
        self.progress.start("allocation: dense model", steps * (count - start))
        for index, layer in walk:
            linears = linears_of(layer, self.target.architecture.layer_name(index))
            shared: Shared = {}
            if opened is not None:
                stores = index + 1 < count
                step = partial(self.progress.step, note=f"layer {index}")
                inputs = opened.layer_inputs(index, partial(self.settings.matmuls, device), step)
                forwards = [
                    partial(inputs.pass_one, layer, b, stores=stores) for b in inputs.batches
                ]
                groups = opened.stream.layouts[index].groups
                shared = self.gathered(layer, groups, linears, names, forwards)
                for statistics in dict.fromkeys(x for x, _ in shared.values()):  # each once
                    statistics.merge(ranks)
            view_of = partial(LayerView, self, index, linears, shared, grains)
            ranks.once(partial(_observe, allocation, view_of, files[index]))
            if opened is None:
                self.progress.step(note=f"layer {index}")
        self.progress.finish()
        return files

    def gathered(
        self,
        layer: nn.Module,
        groups: Sequence[Sequence[str]],
        linears: Linears,
        names: Mapping[str, ForwardSource],
        forwards: Sequence[Callable[[], object]],
    ) -> Shared:
        """Pass windows through a dense layer. Return the statistics of each linear's input."""
        changed = [[linears[name] for name in group] for group in groups]
        changed = [group for group in changed if any(self.tasks[x.name].changes for x in group)]
        gathered = Gathered(names, batches_of(layer, changed), self.target.device)
        by_layer(gathered.batches, forwards, gathered.add)
        return {
            linear.name: (statistics, number)
            for statistics in gathered.all_taken()
            for number, group in enumerate(statistics.groups)
            for linear in group
        }


class LayerView:
    """The view of one dense decoder layer for an allocation (`allocation.DenseLayer`).

    Args:
        survey: gives the tasks of the run.
        index: number of the layer.
        linears: its linears.
        shared: the statistics of each linear's input, by name.
        grains: grains of the competing linears.
    """

    def __init__(
        self,
        survey: Survey,
        index: int,
        linears: Linears,
        shared: Shared,
        grains: Mapping[str, Granularity],
    ) -> None:
        self.tasks, self.grains, self.settings = survey.tasks, grains, survey.settings
        of_expert = survey.target.architecture.of_expert
        names = gathering(self.tasks).backward
        own = stored_gradients(survey.settings.work, index, names, survey.target.device)
        self.linears = {linear.name: linear for linear in linears.values()}
        self.weights = {n: x.weight for n, x in self.linears.items() if n in grains}
        sparsities = {n: self.tasks[n].sparsity for n in self.linears if n not in grains}
        self.fixed = {n: sparsity for n, sparsity in sparsities.items() if sparsity > 0}
        # linears that share an input share its statistics, and are one group of solves
        self.shared, together = shared, dict.fromkeys(s for s, _ in shared.values())
        self.solving = {s: Solving(s, self.settings, own) for s in together}
        self.tokens = {name: s.tokens[number] for name, (s, number) in shared.items()}
        of_group = {
            name: {**self.solving[s].statistics(number), **s.own(self.linears[name])}
            for name, (s, number) in shared.items()
        }
        self.statistics = {
            name: {**of_group.get(name, {}), **own(linear), STORED: linear.weight}
            for name, linear in self.linears.items()
        }
        self.prepared: tuple[object, Any] | None = None
        self.unreached = [
            name
            for name in filter(of_expert, self.weights)
            if not is_reached(self.tokens.get(name), own(self.linears[name]))
        ]

    def score(self, name: str) -> Tensor:
        """The scores of the pattern's units, by the score of the linear's task."""
        method = self.tasks[name].method
        score = method.score(self.linears[name].weight, self.statistics[name])
        return method.pattern.units(score)

    def _asked(self, name: str, share: float, *, quick: bool) -> LinearTask:
        """The task of a linear with another sparsity, and perhaps a quick method."""
        task = self.tasks[name]
        method = _quick(task.method) if quick else task.method
        return replace(task, method=method, sparsity=uniform_if_equal(task, share))

    def solve(self, name: str, sparsity: float, *, quick: bool = False) -> Tensor:
        """The weight after pruning by the run, or quickly, in the dtype of the model."""
        task = self._asked(name, sparsity, quick=quick)
        if task.sparsity == 0:
            return self.linears[name].weight
        return self.solved(name, task.method, task.sparsity)

    def solve_all(
        self, sparsities: Mapping[str, float], *, quick: bool = False
    ) -> dict[str, Tensor]:
        """`solve` for some linears, by name; experts are solved many at once."""
        asked = {name: self._asked(name, x, quick=quick) for name, x in sparsities.items()}
        changed = {name: task for name, task in asked.items() if task.sparsity > 0}
        found = {
            linear.name: own.weight.to(linear.weight.dtype)
            for solving in self.solving.values()
            if solving.group.batch
            for solved in solving.solve(changed)
            for linear, own in zip(solved.linears, solved.solution.each(), strict=True)
        }
        rest = {name: share for name, share in sparsities.items() if name not in found}
        return found | {name: self.solve(name, x, quick=quick) for name, x in rest.items()}

    def solved(self, name: str, method: Method, sparsity: float) -> Tensor:
        """The weight after pruning or rounding by a method, in the dtype of the model."""
        weight = self.linears[name].weight
        key = self.shared.get(name), method.solver
        if self.prepared is None or self.prepared[0] != key:
            # Linears that share an input are consecutive, so only one factor is in memory.
            with located(name):
                self.prepared = key, method.solver.prepare(self.statistics[name])
        known = self.statistics[name]
        with located(name):
            solution = method.solve(weight, self.prepared[1], known, sparsity)
        return solution.weight.to(weight.dtype)


def _quick(method: Method) -> Method:
    """SparseGPT with a method's pattern, if the method's own solver also reads the gram."""
    # other solvers that read it take many times as long, and levels are only compared
    is_quick = method.solver_name == "obs" or "gram" not in method.solver.requires
    if is_quick or method.pattern.whole_units:  # SparseGPT chooses single weights
        return method
    return replace(
        method,
        name="sparsegpt",
        score_name="obs",
        score=scores["obs"](),
        solver_name="obs",
        solver=solvers["obs"](),
        refinement=None,
    )


def _observe(allocation: Allocation, view_of: Callable[[], LayerView], file: Path) -> None:
    """Write what an allocation keeps of a layer, unless an earlier run has."""
    if file.exists():
        return
    view = view_of()
    refuse_unreached(view.unreached)
    kept = allocation.observe(view)
    write_tensors(file, {k: v.cpu().contiguous() for k, v in kept.items()})
