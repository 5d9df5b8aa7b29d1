"""Allocation over a model: one pass through the dense model sets the sparsity of each linear.

Calibration passes through the dense model layer by layer, with one layer in memory. The allocation
stores values of each layer: a number for each linear, its scores, or its weights at several
levels. Each layer has one file, so a killed run resumes after the last file.

The result is a task for each linear. The run later chooses the weights to prune, layer by layer,
on the inputs of the pruned model. For the global scope with scores that do not depend on
inputs (magnitude, gradient), the result is exactly the mask of one threshold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.calibration.statistics import Gathering
from secateur.engine.prune.coverage import is_reached, refuse_unreached
from secateur.engine.prune.group_pruning import GroupStatistics
from secateur.engine.prune.tasks import (
    LinearTask,
    Settings,
    Tasks,
    gathering,
    with_sparsities,
)
from secateur.engine.search.candidate_evaluator import (
    WeightVariants,
    cut_windows,
)
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.gradients import stored_gradients
from secateur.engine.stream.halted_forwards import by_layer
from secateur.engine.stream.targets import Target, walk_layers
from secateur.models.architecture import Linear, linears_of
from secateur.precision import full_float32
from secateur.progress import Progress
from secateur.runs.atomic import write_json, write_tensors
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.search import LevelSearch
from secateur.sparsity.exact_count import pruned_count
from secateur.types import STORED


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
            units = shape[0] * shape[1] // step
            before, seen = seen, seen + units
            counts = [pruned_count(total, asked) for total in (before, seen)]
            pruned = (counts[1] - counts[0]) * step
        grain = Granularity.around(shape, step, pruned, asked, allocation.reach)
        grains[name] = grain if task.cost is None else replace(grain, weights=task.cost)
    return grains


def _plain(task: LinearTask, share: float) -> float:
    """Return the sparsity of a task if it prunes as many weights as `share`, else `share`."""
    pattern, shape, asked = task.method.pattern, task.shape, task.sparsity
    return asked if pattern.pruned(shape, asked) == pattern.pruned(shape, share) else share


def _needed_statistics(tasks: Tasks, allocation: Allocation) -> frozenset[str]:
    """The statistics of inputs that an allocation needs."""
    names = set(allocation.requires)
    for task in tasks.values():
        if "score" in allocation.uses:
            names |= task.method.score.requires
        if "solver" in allocation.uses:
            names |= task.method.requires
    return Gathering.of(names).forward


def _first_missing(files: Sequence[Path]) -> int:
    """The number of the first file that does not exist; their number if all do."""
    return next((i for i, file in enumerate(files) if not file.exists()), len(files))


class Survey:
    """One pass through the whole dense model, layer by layer, for an allocation.

    Args:
        target: the model.
        tasks: the tasks of the linears before the allocation.
        calibration: the calibration stream; None without calibration.
        settings: how the work is done.
        progress: receives every step.
    """

    def __init__(
        self,
        target: Target,
        tasks: Tasks,
        calibration: CalibrationStream | None,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.target, self.tasks, self.calibration = target, tasks, calibration
        self.settings, self.progress = settings, progress

    @property
    def work(self) -> Path:
        """The folder for the files."""
        assert self.settings.work is not None
        return self.settings.work

    @torch.no_grad()
    def execute(self, allocation: Allocation, grains: Mapping[str, Granularity]) -> list[Path]:
        """Pass every layer to the allocation. Return one file for each layer."""
        count = len(self.target.layers)
        files = [self.work / f"survey-{i:04d}.safetensors" for i in range(count)]
        names = _needed_statistics(self.tasks, allocation)
        start = self.settings.ranks.once(lambda: _first_missing(files))
        if start == count:
            return files
        calibration = self.calibration if names else None
        if calibration is not None:
            start = calibration.open(start, dense=False)
        steps = len(calibration.batches()) if calibration is not None else 1
        self.progress.start("allocation: dense model", steps * (count - start))
        walk = (
            calibration.walk(start)
            if calibration
            else walk_layers(self.target, range(start, count))
        )
        for index, layer in walk:
            self._observe(index, layer, allocation, grains, names, files[index])
            if calibration is None:
                self.progress.step(note=f"layer {index}")
        self.progress.finish()
        if calibration is not None:
            calibration.close()
        return files

    def _observe(
        self,
        index: int,
        layer: nn.Module,
        allocation: Allocation,
        grains: Mapping[str, Granularity],
        names: frozenset[str],
        file: Path,
    ) -> None:
        """Pass calibration through one dense layer, and write the values for the allocation."""
        linears = linears_of(layer, self.target.architecture.layer_name(index))
        shared = self.gathered(index, layer, linears, names) if names else {}

        def keep() -> None:
            if file.exists():
                return
            view = self.view(index, linears, shared, grains)
            refuse_unreached(view.unreached)
            kept = allocation.observe(view)
            write_tensors(file, {k: v.cpu().contiguous() for k, v in kept.items()})

        self.settings.ranks.once(keep)

    def gathered(
        self, index: int, layer: nn.Module, linears: Mapping[str, Linear], names: frozenset[str]
    ) -> dict[str, GroupStatistics]:
        """Pass calibration through a dense layer. Return the statistics of each linear's input."""
        assert self.calibration is not None
        last = index + 1 == len(self.target.layers)
        step = partial(self.progress.step, note=f"layer {index}")
        inputs = self.calibration.layer_inputs(index, step=step)
        groups = [[linears[name] for name in g] for g in self.calibration.layouts[index].groups]
        groups = [g for g in groups if any(self.tasks[x.name].changes for x in g)]
        gathered = [GroupStatistics(names, group, self.target.device) for group in groups]
        forwards = [partial(inputs.pass_one, layer, b, stores=not last) for b in inputs.batches]
        by_layer(groups, forwards, lambda group, x: gathered[group].update(x))
        for statistics in gathered:
            statistics.merge(self.settings.ranks)
        return {
            linear.name: statistics
            for group, statistics in zip(groups, gathered, strict=True)
            for linear in group
        }

    def view(
        self,
        index: int,
        linears: Mapping[str, Linear],
        shared: Mapping[str, GroupStatistics],
        grains: Mapping[str, Granularity],
    ) -> LayerView:
        """The view of the layer for an allocation."""
        names = gathering(self.tasks).backward
        own = stored_gradients(self.settings.work, index, names, self.target.device)
        of_expert = self.target.architecture.of_expert
        reached = {
            x.name: not of_expert(x.name)
            or is_reached(shared[x.name].tokens if x.name in shared else None, own(x))
            for x in linears.values()
        }
        return LayerView(list(linears.values()), self.tasks, shared, own, grains, reached)


class LayerView:
    """The view of one dense decoder layer for an allocation (`allocation.DenseLayer`).

    Args:
        linears: linears of the layer.
        tasks: tasks of the run.
        shared: the statistics of each linear's input, by name.
        own: returns the statistics of a linear's gradients.
        grains: grains of the competing linears.
        reached: whether calibration reached each linear.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        tasks: Tasks,
        shared: Mapping[str, GroupStatistics],
        own: Callable[[Linear], Mapping[str, Tensor]],
        grains: Mapping[str, Granularity],
        reached: Mapping[str, bool],
    ) -> None:
        self.tasks, self.grains = tasks, grains
        self.linears = {linear.name: linear for linear in linears}
        self.weights = {n: x.weight for n, x in self.linears.items() if n in grains}
        self.fixed = {
            n: tasks[n].sparsity for n in self.linears if n not in grains and tasks[n].sparsity > 0
        }
        values = {id(s): s.value() for s in shared.values()}
        self.group = {name: id(statistics) for name, statistics in shared.items()}
        self.tokens = {name: statistics.tokens for name, statistics in shared.items()}
        self.statistics = {
            name: {
                **values.get(self.group.get(name, 0), {}),
                **(shared[name].own(linear) if name in shared else {}),
                **own(linear),
                STORED: linear.weight,
            }
            for name, linear in self.linears.items()
        }
        self.prepared: tuple[int, Any] | None = None
        self.unreached = [name for name in self.weights if not reached[name]]

    def score(self, name: str) -> Tensor:
        """The scores of the pattern's units, by the score of the linear's task."""
        method = self.tasks[name].method
        score = method.score(self.linears[name].weight, self.statistics[name])
        return method.pattern.units(score)

    def solve(self, name: str, sparsity: float) -> Tensor:
        """The weight after pruning by the run, in the dtype of the model."""
        task, weight = self.tasks[name], self.linears[name].weight
        sparsity = _plain(task, sparsity)
        if sparsity == 0:
            return weight
        group = self.group.get(name, 0)
        if self.prepared is None or self.prepared[0] != group:
            # Linears that share an input are consecutive, so only one factor is in memory.
            self.prepared = group, task.method.solver.prepare(self.statistics[name])
        known = self.statistics[name]
        solution = task.method.solve(weight, self.prepared[1], known, sparsity)
        return solution.weight.to(weight.dtype)


@dataclass(frozen=True)
class FoundLevels:
    """The result of a search.

    Attributes:
        sparsity_of: the sparsity of every linear.
        divergence: divergence of the best candidate, in nats per token, on the tokens of the last
            stage.
        uniform_divergence: divergence of uniform sparsity, on the same tokens.
    """

    sparsity_of: dict[str, float]
    divergence: float
    uniform_divergence: float


@torch.no_grad()
def search_levels(
    survey: Survey, search: LevelSearch, grains: Mapping[str, Granularity], files: Sequence[Path]
) -> FoundLevels:
    """Search the levels of all competing linears.

    Args:
        survey: gives the model, the calibration tokens, and the folder for `search.jsonl`.
        search: the parameters.
        grains: grains of the competing linears.
        files: for each layer, the weights of its linears at each level, from `LevelSearch.observe`.
    """
    assert survey.calibration is not None
    rungs = search.ladders(grains)
    tokens = search.judged_tokens
    outer = EmbeddingAndHead(survey.target, cut_windows(survey.calibration.windows, tokens))
    fixed = {n for n, task in survey.tasks.items() if task.sparsity > 0 and n not in rungs}
    variants = LevelVariants(outer, list(rungs), fixed, files)
    file = survey.work / "search.jsonl"
    fitness = variants.fitness("divergence", tokens, file, survey.progress)
    survey.progress.start("allocation: search", search.generations + 1)
    informed = search.informed(_stored_errors(files), rungs)
    for leader in search.climb(list(rungs.values()), informed, fitness):
        found = leader
        survey.progress.step()
    survey.progress.finish()
    (uniform,) = fitness([(0,) * len(rungs)], tokens, 0)
    levels = zip(rungs.items(), found.candidate, strict=True)
    sparsity_of = {name: ladder.sparsity(level) for (name, ladder), level in levels}
    return FoundLevels(sparsity_of, found.fitness, uniform)


def _stored_errors(files: Sequence[Path]) -> dict[str, float]:
    """The error of every linear at its target, without reading the weights in the same file."""
    errors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith("/error"):
                    errors[key.removesuffix("/error")] = float(file.get_tensor(key))
    return errors


class LevelVariants(WeightVariants):
    """Decoder layers at levels of sparsity.

    Args:
        outer: embedding and head of the model.
        competing: names of the competing linears; a candidate has a level for each.
        fixed: linears with their own sparsity.
        files: for each layer, the weights of its linears at each level.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        competing: Sequence[str],
        fixed: set[str],
        files: Sequence[Path],
    ) -> None:
        super().__init__(outer, competing)
        self.fixed, self.files = fixed, files

    def source(self, number: int) -> AbstractContextManager[Any]:
        """The file of the layer."""
        return cast(AbstractContextManager[Any], safe_open(self.files[number], "pt"))

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight at a level; a linear with its own sparsity has only one."""
        if level is None and linear.name not in self.fixed:
            return None
        weight: Tensor = source.get_tensor(f"{linear.name}/{level or 0}")
        weight = weight.to(self.outer.target.device)
        return weight.t() if linear.transposed else weight


def settled_allocation(work: Path) -> Path:
    """The file with the sparsity of every linear."""
    return work / "allocation.json"


@full_float32()
def allocate(survey: Survey, allocation: Allocation, sparsity: float) -> Tasks:
    """Return the tasks of a run with the sparsities of an allocation in place of uniform ones.

    Linears with their own sparsity keep it and do not compete. Excluded linears stay dense.

    Args:
        survey: survey of the dense model.
        allocation: sets the sparsity of each linear.
        sparsity: sparsity of the whole model.
    """
    grains = grains_of(survey.tasks, allocation)
    if allocation.reach == 0 or not grains:
        return survey.tasks
    settled, ranks = settled_allocation(survey.work), survey.settings.ranks
    if not ranks.once(settled.exists):
        files = survey.execute(allocation, grains)
        ranks.once(lambda: _settle_into(settled, survey, allocation, grains, files, sparsity))
    found = ranks.once(lambda: json.loads(settled.read_text()))
    return with_sparsities(survey.tasks, found["sparsity_of"])


def _settle_into(
    settled: Path,
    survey: Survey,
    allocation: Allocation,
    grains: dict[str, Granularity],
    files: list[Path],
    sparsity: float,
) -> None:
    """Write the sparsity of every linear into a file, from what the survey has stored."""
    found: dict[str, Any] = {}
    if allocation.judged_tokens:
        levels = search_levels(survey, cast(LevelSearch, allocation), grains, files)
        ideal = levels.sparsity_of
        found = {
            "divergence": levels.divergence,
            "uniform_divergence": levels.uniform_divergence,
        }
    else:
        ideal = allocation.allocate(partial(stored, files), grains, sparsity)
    shares = {
        name: _plain(survey.tasks[name], share) for name, share in settle(ideal, grains).items()
    }
    write_json(settled, {"sparsity_of": shares, **found})
    for file in files:
        file.unlink()


def stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The allocation's stored values of all layers, with one tensor in memory at a time."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
