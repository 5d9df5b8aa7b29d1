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
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from secateur.calibration.statistics import ForwardSource, Gathering
from secateur.engine.plan import PartNeeds
from secateur.engine.prune.coverage import is_reached, refuse_unreached
from secateur.engine.prune.statistics import GroupStatistics
from secateur.engine.prune.tasks import (
    LinearTask,
    Settings,
    Tasks,
    gathered_bytes,
    gathering,
    settled_allocation,
    with_sparsities,
)
from secateur.engine.search.candidate_evaluator import (
    WINDOW_TOKENS,
    CandidateEvaluator,
    FitnessCache,
    Version,
    Versions,
    cut_windows,
)
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.gradients import only_learning, stored_gradients
from secateur.engine.stream.halted_forwards import by_layer
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwisePass
from secateur.engine.stream.layouts import layouts
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import located
from secateur.models.architecture import Linear, linears_of, text_config
from secateur.precision import exact_matmuls, full_float32
from secateur.progress import Progress
from secateur.runs.output import write_json, write_tensors
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.search import LevelSearch, is_measured_alone
from secateur.sparsity.evolution import Candidate
from secateur.sparsity.exact_count import pruned_count
from secateur.sparsity.methods import Method
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.types import STORED

_ROWS = 64  # tokens whose probabilities are in memory at once
_ALONE = "alone"  # the folder of `ChangedAlone`

Linears = Mapping[str, Linear]
"""The linears of a decoder layer, by their names in it."""


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
        grains[name] = grain if task.cost is None else grain._replace(weights=task.cost)
    return grains


def _plain(task: LinearTask, share: float) -> float:
    """Return the sparsity of a task if it prunes as many weights as `share`, else `share`."""
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
        opened = self.calibration.open(start) if names and self.calibration else None
        if opened is not None:
            start, walk, steps = opened.start, opened.walk(), len(opened.batches())
        else:
            walk, steps = walk_layers(self.target, range(start, count)), 1
        self.progress.start("allocation: dense model", steps * (count - start))
        for index, layer in walk:
            linears = linears_of(layer, self.target.architecture.layer_name(index))
            shared = {}
            if opened is not None:
                stores = index + 1 < count
                step = partial(self.progress.step, note=f"layer {index}")
                inputs = opened.layer_inputs(index, partial(self.settings.matmuls, device), step)
                forwards = [
                    partial(inputs.pass_one, layer, b, stores=stores) for b in inputs.batches
                ]
                groups = opened.stream.layouts[index].groups
                shared = self.gathered(groups, linears, names, forwards)
                for statistics in dict.fromkeys(shared.values()):
                    statistics.merge(ranks)
            view_of = partial(LayerView, self, index, linears, shared, grains)
            ranks.once(partial(_observe, allocation, view_of, files[index]))
            if opened is None:
                self.progress.step(note=f"layer {index}")
        self.progress.finish()
        return files

    def gathered(
        self,
        groups: Sequence[Sequence[str]],
        linears: Linears,
        names: Mapping[str, ForwardSource],
        forwards: Sequence[Callable[[], object]],
    ) -> dict[str, GroupStatistics]:
        """Pass windows through a dense layer. Return the statistics of each linear's input."""
        changed = [[linears[name] for name in group] for group in groups]
        changed = [group for group in changed if any(self.tasks[x.name].changes for x in group)]
        gathered = [GroupStatistics(names, group, self.target.device) for group in changed]

        def gather(group: int, x: Tensor) -> None:
            with exact_matmuls(self.target.device):  # forwards may be in bfloat16
                gathered[group].update(x)

        by_layer(changed, forwards, gather)
        return {
            linear.name: statistics
            for group, statistics in zip(changed, gathered, strict=True)
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
        shared: Mapping[str, GroupStatistics],
        grains: Mapping[str, Granularity],
    ) -> None:
        self.tasks, self.grains = survey.tasks, grains
        of_expert = survey.target.architecture.of_expert
        names = gathering(self.tasks).backward
        own = stored_gradients(survey.settings.work, index, names, survey.target.device)
        self.linears = {linear.name: linear for linear in linears.values()}
        self.weights = {n: x.weight for n, x in self.linears.items() if n in grains}
        sparsities = {n: self.tasks[n].sparsity for n in self.linears if n not in grains}
        self.fixed = {n: sparsity for n, sparsity in sparsities.items() if sparsity > 0}
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

    def solve(self, name: str, sparsity: float, *, quick: bool = False) -> Tensor:
        """The weight after pruning by the run, or quickly, in the dtype of the model."""
        task, weight = self.tasks[name], self.linears[name].weight
        sparsity = _plain(task, sparsity)
        if sparsity == 0:
            return weight
        return self.solved(name, _quick(task.method) if quick else task.method, sparsity)

    def solved(self, name: str, method: Method, sparsity: float) -> Tensor:
        """The weight after pruning or rounding by a method, in the dtype of the model."""
        weight = self.linears[name].weight
        key = self.group.get(name, 0), method.solver
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


@torch.no_grad()
def search_levels(
    survey: Survey, search: LevelSearch, grains: Mapping[str, Granularity], files: Sequence[Path]
) -> tuple[dict[str, float], dict[str, float]]:
    """Search the levels of all competing linears.

    Returns the sparsity of every linear; and the divergence of the best candidate and of uniform
    sparsity, in nats per token, on the tokens of the last stage.

    Args:
        survey: gives the model, the calibration tokens, and the folder for `search.jsonl`.
        search: the parameters.
        grains: grains of the competing linears.
        files: for each layer, the weights of its linears at each level, from `LevelSearch.observe`.
    """
    assert survey.calibration is not None
    rungs = search.ladders(grains)
    tokens = search.judged_tokens
    windows, fast = cut_windows(survey.calibration.windows, tokens), survey.settings.fast_matmuls
    outer = EmbeddingAndHead(survey.target, windows, fast=fast)
    fixed = {n for n, task in survey.tasks.items() if task.sparsity > 0 and n not in rungs}
    variants = LevelVariants(outer, list(rungs), fixed, files)
    file = survey.work / "search.jsonl"
    evaluator = CandidateEvaluator(outer, variants, survey.progress)
    fitness = FitnessCache(evaluator, variants.versions, variants.names, tokens, file)
    survey.progress.start("allocation: search", search.generations + 1)
    errors: dict[str, float] = {}  # at the targets, without reading the weights in the same files
    for path in files:
        with safe_open(path, "pt") as stored_layer:
            found = [key for key in stored_layer.keys() if key.endswith("/error")]  # noqa: SIM118
            names = [key.removesuffix("/error") for key in found]
            errors |= {n: float(stored_layer.get_tensor(f"{n}/error")) for n in names}
    informed = search.informed(errors, rungs)
    for leader in search.climb(list(rungs.values()), informed, fitness):
        best = leader
        survey.progress.step()
    survey.progress.finish()
    (uniform,) = fitness([(0,) * len(rungs)], tokens, 0)
    levels = zip(rungs.items(), best.candidate, strict=True)
    sparsity_of = {name: ladder.sparsity(level) for (name, ladder), level in levels}
    return sparsity_of, {"divergence": best.fitness, "uniform_divergence": uniform}


class LevelVariants:
    """Decoder layers whose linears have the weights of given levels of sparsity.

    The version of a layer is a tuple with the level of each of its competing linears. In the dense
    model it is `dense`.

    Args:
        outer: embedding and head of the model.
        competing: names of the competing linears; a candidate has a level for each.
        fixed: linears with their own sparsity.
        files: for each layer, the weights of its linears at each level.
    """

    dense: ClassVar[Version] = "dense"

    def __init__(
        self,
        outer: EmbeddingAndHead,
        competing: Sequence[str],
        fixed: set[str],
        files: Sequence[Path],
    ) -> None:
        self.outer, self.names = outer, list(competing)
        self.fixed, self.files = fixed, files
        layer_name, count = outer.target.architecture.layer_name, len(outer.target.layers)
        prefixes = [layer_name(index) + "." for index in range(count)]
        self.places = [
            [place for place, name in enumerate(competing) if name.startswith(prefix)]
            for prefix in prefixes
        ]

    def versions(self, candidate: Candidate) -> Versions:
        """The levels of a candidate, layer by layer."""
        return tuple(tuple(candidate[place] for place in places) for places in self.places)

    @contextmanager
    def opened(
        self, number: int, layer: nn.Module
    ) -> Iterator[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """The forward of each version. Making a forward reads its weights."""
        prefix = self.outer.target.architecture.layer_name(number)
        linears, names = linears_of(layer, prefix), [self.names[p] for p in self.places[number]]
        with safe_open(self.files[number], "pt") as stored:

            def forward_of(version: Version) -> Callable[[Tensor], Tensor]:
                if version == self.dense:
                    return partial(self.outer.run, number, layer)
                level_of = dict(zip(names, cast(tuple[int, ...], version), strict=True))
                weights: dict[str, Tensor] = {}
                for name, linear in linears.items():
                    level = level_of.get(linear.name, 0 if linear.name in self.fixed else None)
                    if level is not None:
                        weight = stored.get_tensor(f"{linear.name}/{level}")
                        weight = weight.to(self.outer.target.device)
                        weights[f"{name}.weight"] = weight.t() if linear.transposed else weight

                def replaced(*args: Any, **kwargs: Any) -> Any:
                    return functional_call(layer, weights, args, kwargs)

                return partial(self.outer.run, number, replaced)

            yield forward_of


Ways = Mapping[str, Mapping[str, Tensor]]
"""Ŵ − W of linears, by their full names and by the ways in which they are changed."""


class ChangedAlone:
    """The divergence that changing each linear alone makes, to second order.

        D_i = ½ mean_t (g_it · (Ŵ_i − W_i) x_it)²
        g_it = ∂/∂(W_i x_it) of Σ_s −log p(y_s)         y_s drawn from the dense model's p

    One forward and one backward of the dense model measure all linears in all ways, with one
    decoder layer in memory. Before the backward of a layer its linears are changed, on the inputs
    of the same windows. A killed run continues with the layer in which it stopped.

    Derivation: the second-order term of KL(p ‖ p') is ½ δzᵀ F δz with the Fisher matrix
    F = E_y[∇ log p(y) ∇ log p(y)ᵀ], so a drawn y gives an unbiased ½ (Σ_t g_it · δ_it)². The sum of
    squares leaves the products of different tokens out, whose mean is near 0 and whose noise is
    large.

    Args:
        survey: gives the model, the calibration tokens, and the folder for the work.
        tokens: calibration tokens to measure on.
        names: the statistics of the inputs that `ways` reads.
        grains: grains of the competing linears.
        ways: a layer → Ŵ − W of its linears in each way. Experts that saw no token are left out.
    """

    def __init__(
        self,
        survey: Survey,
        tokens: int,
        names: Mapping[str, ForwardSource],
        grains: Mapping[str, Granularity],
        ways: Callable[[LayerView], Ways],
    ) -> None:
        assert survey.calibration is not None
        self.survey, self.names, self.grains, self.ways = survey, names, grains, ways
        self.target, self.folder = survey.target, survey.work / _ALONE
        self.folder.mkdir(parents=True, exist_ok=True)
        windows = cut_windows(survey.calibration.windows, tokens)
        self.outer = EmbeddingAndHead(
            survey.target,
            windows,
            self.folder,
            fast=survey.settings.fast_matmuls,
        )
        self.layouts = layouts(survey.target, windows.shape[1])
        self.walk = LayerwisePass(
            self.outer,
            range(len(windows)),
            self.folder,
            lambda number, window: self.outer.call(number, [window]),
            self.outer.matmuls,
        )

    def divergences(self, label: str) -> dict[str, dict[str, float]]:
        """D_i of each competing linear in each way. Experts that saw no token are left out."""
        walk, files = self.walk, [self.file(n) for n in range(self.walk.count)]
        steps = len(walk.windows) * (2 * walk.count + 1)
        self.survey.progress.start(label, steps)
        if not files[-1].exists() and not walk.gradients.has(walk.count):
            walk.forward(self.opened_dense)
            walk.losses(self.loss)
        walk.backward(self.opened, lambda number: files[number].exists(), lowest=-1)
        self.survey.progress.finish()
        layers = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return {name: found for layer in layers for name, found in layer.items()}

    def file(self, number: int) -> Path:
        """The file with the divergences of a layer."""
        return self.folder / f"divergence-{number:04d}.json"

    @contextmanager
    def opened_dense(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the forward."""
        with self.target.layer(number) as layer:
            yield layer, lambda place: self.survey.progress.step(note=f"layer {number}")

    def loss(self, place: int, hidden: Tensor) -> Tensor:
        """A number with the gradient of Σ_s −log p(y_s) of a window: p − (1 at y_s) at logits s."""
        logits = self.outer.head(place, hidden)
        draw = torch.Generator().manual_seed(place)  # of the CPU: all devices draw the same
        gradient = torch.empty_like(logits)
        with torch.no_grad():
            for rows, own in zip(gradient.split(_ROWS), logits.split(_ROWS), strict=True):
                p = own.float().softmax(-1)
                labels = torch.multinomial(p.cpu(), 1, generator=draw).to(p.device)
                rows.copy_(p.scatter_add_(1, labels, torch.full_like(p[:, :1], -1.0)))
        self.survey.progress.step(note="predictions")
        return torch.dot(logits.flatten(), gradient.flatten())

    @contextmanager
    def opened(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer for the backward; in the end the divergences of its linears are in a file."""
        tokens = self.outer.windows.numel()
        with self.target.layer(number) as layer, only_learning(layer, []):
            linears = linears_of(layer, self.target.architecture.layer_name(number))
            changes = self.changes(number, layer, linears)
            with _products(linears.values(), changes) as sums:
                yield layer, lambda place: self.survey.progress.step(note=f"layer {number}")
        found = {
            name: {way: 0.5 * float(total) / tokens for way, total in ways.items()}
            for name, ways in sums.items()
        }
        write_json(self.file(number), found)

    @torch.no_grad()
    def changes(self, number: int, layer: nn.Module, linears: Linears) -> Ways:
        """Ŵ − W of the competing linears of a layer; no experts that saw no token."""
        survey = self.survey
        passes = range(len(self.walk.windows) if self.names else 0)
        forwards = [partial(self.walk.outputs, number, layer, place) for place in passes]
        shared = survey.gathered(self.layouts[number].groups, linears, self.names, forwards)
        view = LayerView(survey, number, linears, shared, self.grains)
        for name in view.unreached:
            del view.weights[name]
        return self.ways(view)


@contextmanager
def _products(linears: Iterable[Linear], changes: Ways) -> Iterator[dict[str, dict[str, Tensor]]]:
    """A context in which every backward adds Σ_t (g_t · ΔW x_t)² of each linear, float64 []."""
    sums = {
        name: {way: torch.zeros((), dtype=torch.float64) for way in ways}
        for name, ways in changes.items()
    }

    def watching(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            with torch.no_grad():
                moved = {w: args[0].to(x.dtype) @ x.t() for w, x in changes[name].items()}

            def add(gradient: Tensor) -> None:
                for way, change in moved.items():
                    product = (gradient.float() * change.float()).sum(-1)
                    sums[name][way] += product.square().sum(dtype=torch.float64).cpu()

            output.register_hook(add)

        return after

    hooks = [x.module.register_forward_hook(watching(x.name)) for x in linears if x.name in sums]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def pooled(found: Mapping[str, float], grains: Mapping[str, Granularity]) -> dict[str, float]:
    """D_i / n_i of each linear. The experts of a layer count as one linear."""
    units: dict[str, list[str]] = {}
    for name in grains:
        units.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    slopes: dict[str, float] = {}
    for unit in units.values():
        reached = [name for name in unit if name in found]
        weights = sum(grains[name].total for name in reached)
        slope = sum(found[name] for name in reached) / max(weights, 1)
        slopes |= dict.fromkeys(unit, slope)
    return slopes


def pruned_alone(
    survey: Survey, allocation: Allocation, grains: Mapping[str, Granularity]
) -> dict[str, Tensor]:
    """D_i / n_i of each competing linear, pruned by an allocation (`name/1` of `observe`)."""

    def pruned(view: LayerView) -> Ways:
        kept = allocation.observe(view)
        return {name: {"1": kept[f"{name}/1"] - weight} for name, weight in view.weights.items()}

    names = survey.statistics_for(allocation)
    alone = ChangedAlone(survey, allocation.judged_tokens, names, grains, pruned)
    found = alone.divergences("allocation: divergence")
    slopes = pooled({name: ways["1"] for name, ways in found.items()}, grains)
    return {n: torch.tensor(slope, dtype=torch.float64) for n, slope in slopes.items()}


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
        alone = is_measured_alone(allocation)
        files = [] if alone else survey.execute(allocation, grains)

        def settle_all() -> None:
            found: dict[str, float] = {}
            if isinstance(allocation, LevelSearch):
                ideal, found = search_levels(survey, allocation, grains, files)
            elif alone:
                slopes = pruned_alone(survey, allocation, grains)
                ideal = allocation.allocate(slopes.items, grains, sparsity)
            else:
                ideal = allocation.allocate(partial(stored, files), grains, sparsity)
            shares = settle(ideal, grains).items()
            sparsity_of = {name: _plain(survey.tasks[name], share) for name, share in shares}
            write_json(settled, {"sparsity_of": sparsity_of, **found})
            for file in files:
                file.unlink()
            shutil.rmtree(survey.work / _ALONE, ignore_errors=True)

        ranks.once(settle_all)
    found = ranks.once(lambda: json.loads(settled.read_text(encoding="utf-8")))
    return with_sparsities(survey.tasks, found["sparsity_of"])


def stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The allocation's stored values of all layers, with one tensor in memory at a time."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def survey_needs(
    target: Target,
    groups: Sequence[Sequence[Sequence[tuple[int, int]]]],
    allocation: Allocation,
    prunable: int,
    windows: Tensor | None,
    of_token: int,
) -> PartNeeds:
    """The needs of an allocation besides one dense layer: statistics, scores, logits.

    Args:
        target: the model; its layers may be empty.
        groups: for each layer, the shapes of the linears that share an input.
        allocation: sets the sparsity of each linear.
        prunable: number of weights that may be pruned.
        windows: calibration tokens; None if the allocation reads only weights.
        of_token: bytes of a hidden state in float32.
    """
    item = target.dtype.itemsize
    held = allocation.working_bytes(prunable // len(target.layers), item)
    disk = allocation.disk_bytes(prunable, item)
    if windows is None:
        return PartNeeds(held, disk, allocation.tokens(0, 0))
    held += gathered_bytes(Gathering.of(allocation.requires).forward, groups)
    if allocation.judged_tokens:
        # Probabilities of the dense model, logits of a candidate, and one temporary copy; or
        # logits, their gradient, and one copy.
        tokens = min(WINDOW_TOKENS, windows.shape[1])
        held += 3 * 4 * tokens * int(text_config(target.model.config).vocab_size)
        if is_measured_alone(allocation):  # inputs of all layers, gradients of two
            tokens = min(allocation.judged_tokens, windows.numel())
            disk += (len(target.layers) + 3) * tokens * of_token
    linears = sum(len(group) for layer in groups for group in layer)
    return PartNeeds(held, disk, allocation.tokens(windows.numel(), linears))
