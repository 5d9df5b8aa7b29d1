"""Allocation over a model: one look at the whole dense model decides how much each linear loses.

The dense model passes layer by layer, one in memory. What the allocation keeps of a layer (a
number for each linear, its scores, or weights solved at several levels) goes to a file, so that a
killed run goes on behind the last one. The result is a sparsity for each linear; which weights it
takes is decided layer by layer later, on the inputs the pruned model really sees. For the global
scope with scores that do not depend on inputs (magnitude, gradient) that is exactly the mask of
one threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.engine.choose.levels import search_levels
from secateur.engine.prune.layer_pass import LayerPass
from secateur.engine.prune.routing import is_reached, refuse_unreached
from secateur.engine.prune.run import Run
from secateur.engine.prune.surgery import INPUT_STATISTICS, GroupStatistics, check_finite
from secateur.engine.stream.forwards import by_layer
from secateur.engine.stream.walk import walk_layers
from secateur.models.architecture import Linear
from secateur.precision import full_float32
from secateur.runs.atomic import write_json, write_tensors
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.search import Search
from secateur.sparsity.exact_count import pruned_count

__all__ = ["allocate", "settled_allocation"]


def settled_allocation(work: Path) -> Path:
    """The file in which the sparsity of every linear is kept once it is known."""
    return work / "allocation.json"


@full_float32()
def allocate(run: Run, allocation: Allocation) -> None:
    """Replace the uniform sparsity a run asks of its linears by that of an allocation.

    Linears with a sparsity of their own, and those left out, keep it and do not compete.
    """
    grains = grains_of(run, allocation)
    if allocation.reach == 0 or not grains:
        return
    assert run.settings.work is not None
    settled = settled_allocation(run.settings.work)
    if not settled.exists():
        files = survey(run, allocation, grains)
        found: dict[str, Any] = {}
        if isinstance(allocation, Search):
            levels = search_levels(run, allocation, grains, files)
            wished = levels.sparsity_of
            found = {
                "divergence": levels.divergence,
                "uniform_divergence": levels.uniform_divergence,
            }
        else:
            wished = allocation.wish(partial(stored, files), grains, run.sparsity)
        shares = {name: plain(run, name, s) for name, s in settle(wished, grains).items()}
        write_json(settled, {"sparsity_of": shares, **found})
        for file in files:
            file.unlink()
    run.sparsity_of.update(json.loads(settled.read_text())["sparsity_of"])


def grains_of(run: Run, allocation: Allocation) -> dict[str, Granularity]:
    """How finely and how far every competing linear can be pruned.

    With the global scope the counts of the linears are those of one running total, so that the
    whole loses the number nearest to its sparsity.
    """
    grains, seen = {}, 0
    for name, shape in run.shapes.items():
        asked = run.selection.asked(name, run.sparsity)
        if run.sparsity_of[name] <= 0 or run.selection.override(name) is not None:
            continue
        pattern = run.method_for(name).pattern
        pruned, step = pattern.pruned(shape, asked), pattern.step(shape)
        if pattern.scope == "global":
            units = shape[0] * shape[1] // step
            before, seen = seen, seen + units
            counts = [pruned_count(total, asked) for total in (before, seen)]
            pruned = (counts[1] - counts[0]) * step
        grain = Granularity.around(shape, step, pruned, asked, allocation.reach)
        grains[name] = replace(grain, weights=run.costs.get(name, grain.weights))
    return grains


def plain(run: Run, name: str, share: float) -> float:
    """The sparsity asked of this linear, if it prunes as many of its weights as `share`."""
    pattern, shape = run.method_for(name).pattern, run.shapes[name]
    asked = run.selection.asked(name, run.sparsity)
    same = pattern.pruned(shape, asked) == pattern.pruned(shape, share)
    return asked if same else share


def stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """What was kept of all layers, one tensor in memory at a time."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def needed_statistics(run: Run, allocation: Allocation) -> frozenset[str]:
    """The statistics of inputs that the look at the dense model gathers."""
    names = allocation.requires
    if "score" in allocation.uses:
        names |= run.method.score.requires
    if "solver" in allocation.uses:
        names |= run.method.requires
    return names & INPUT_STATISTICS


@torch.no_grad()
def survey(run: Run, allocation: Allocation, grains: Mapping[str, Granularity]) -> list[Path]:
    """Let the allocation look at every layer of the dense model; one file per layer."""
    target, work = run.target, run.settings.work
    assert work is not None
    files = [work / f"survey-{i:04d}.safetensors" for i in range(len(target.layers))]
    names = needed_statistics(run, allocation)
    start = next((i for i, file in enumerate(files) if not file.exists()), len(files))
    if start == len(files):
        return files
    passage = run.passage if names else None
    if passage is not None:
        start = passage.open(start, dense=False)
    steps = len(passage.batches()) if passage is not None else 1
    run.progress.start("allocation: dense model", steps * (len(files) - start))
    walk = walk_layers(target, range(start, len(files))) if passage is None else passage.walk(start)
    for index, layer in walk:
        passing = LayerPass(run, index, layer)
        check_finite(list(passing.linears.values()))
        shared = gather_dense(passing, names)
        if not files[index].exists():
            view = LayerView(run, index, passing.linears, shared, grains)
            refuse_unreached(view.unreached)
            kept = allocation.look(view)
            write_tensors(files[index], {k: v.cpu().contiguous() for k, v in kept.items()})
        if passage is None:
            run.step(index)
    run.progress.finish()
    if passage is not None:
        passage.close()
    return files


def gather_dense(passing: LayerPass, names: frozenset[str]) -> dict[str, GroupStatistics]:
    """Pass all calibration tokens through a dense layer; the statistics of each linear's input."""
    if not names:
        return {}
    assert passing.passage is not None
    groups, device = passing.grouped(), passing.run.target.device
    gathered = [GroupStatistics(names, group[0], device) for group in groups]
    batches = passing.passage.batches()
    forwards = [passing.forward(batch, write=not passing.last) for batch in batches]
    by_layer(groups, forwards, lambda group, x: gathered[group].update(x))
    return {
        linear.name: statistics
        for group, statistics in zip(groups, gathered, strict=True)
        for linear in group
    }


class LayerView:
    """One dense decoder layer, as an allocation sees it (`allocation.DenseLayer`)."""

    def __init__(
        self,
        run: Run,
        index: int,
        linears: Mapping[str, Linear],
        shared: Mapping[str, GroupStatistics],
        grains: Mapping[str, Granularity],
    ) -> None:
        self.run, self.grains = run, grains
        self.linears = {linear.name: linear for linear in linears.values()}
        self.weights = {n: x.weight for n, x in self.linears.items() if n in grains}
        self.fixed = {
            n: run.sparsity_of[n]
            for n in self.linears
            if n not in grains and run.sparsity_of[n] > 0
        }
        values = {id(s): s.value() for s in shared.values()}
        own = run.own_statistics(index)
        self.group = {name: id(statistics) for name, statistics in shared.items()}
        self.tokens = {name: statistics.tokens for name, statistics in shared.items()}
        self.statistics = {
            name: {
                **values.get(self.group.get(name, 0), {}),
                **own(linear),
                "stored": linear.weight,
            }
            for name, linear in self.linears.items()
        }
        self.prepared: tuple[int, Any] | None = None
        self.unreached = [
            name
            for name in self.weights
            if not is_reached(
                run.target.architecture,
                self.linears[name],
                shared[name].tokens if name in shared else None,
                own(self.linears[name]),
            )
        ]

    def score(self, name: str) -> Tensor:
        """The pattern's units of the run's score."""
        method = self.run.method_for(name)
        score = method.score(self.linears[name].weight, self.statistics[name])
        return method.pattern.units(score)

    def solve(self, name: str, sparsity: float) -> Tensor:
        """The weight as the run would leave it, in the dtype of the model."""
        method, weight = self.run.method_for(name), self.linears[name].weight
        sparsity = plain(self.run, name, sparsity)
        if sparsity == 0:
            return weight
        group = self.group.get(name, 0)
        if self.prepared is None or self.prepared[0] != group:
            # Linears that share an input come one after the other; one factor is in memory.
            self.prepared = group, method.solver.prepare(self.statistics[name])
        mask = None
        if not method.solver_selects:
            mask = method.mask(weight, self.statistics[name], sparsity)
        solution = method.solver.solve(
            weight, self.prepared[1], method.pattern, sparsity, mask=mask
        )
        return solution.weight.to(weight.dtype)
