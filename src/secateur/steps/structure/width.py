"""Cuts heads and neurons with the pruning run; the pattern is whole columns.

The linear that reads the heads (output projection) and the linear that reads the neurons (down
projection) lose whole columns. The run selects and compensates them layer by layer on pruned
activations, as for any linear. The rows that produced these columns are then unused and are cut
as well.

A target in time is the largest size of heads and neurons that meets it. Sizes are timed, not
calculated, because time depends on the processor, its memory, and the dtype. There are three
passes. In each pass, a few sizes take turns with the uncut model. The next pass searches between
the largest size that met the target and the next larger size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.engine.plan_memory import PrunePlan
from secateur.engine.prune.prepared import Prepared, choose_plan, prepare
from secateur.errors import RecipeError
from secateur.evaluation.step_time import StepTimer
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import write_json
from secateur.runs.environment import Meter
from secateur.runs.folder import RunFolder
from secateur.sparsity.patterns import Pattern, parse_pattern
from secateur.sparsity.solvers import solvers
from secateur.steps.prune import Prune
from secateur.steps.runner import Run, finish, source_of
from secateur.structured.cut import Cut, Sizes, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import (
    CutPlan,
    pattern_text,
    representative,
    uniform_cut,
    unit_costs,
    width_shares,
)
from secateur.structured.design import design
from secateur.structured.surgery import cut_from_zeros

LEVEL = 0.05
"""The approximate fraction of a layer's neurons in one level of a searched allocation."""

LATENCY = "latency.json"
"""The file of the measurements in the work folder. A resumed run reads it."""

FIRST = (0.85, 0.7, 0.5, 0.3, 0.1)
"""Fractions of heads and neurons to keep in the first pass."""

PASSES = 3

BETWEEN = 4
"""Sizes of each later pass: three passes distinguish fractions of 1 %."""


@dataclass(frozen=True)
class WidthRun:
    """Chooses units with a pruning run, which also refits the linears that read them.

    Attributes:
        recipe: recipe of the cut.
        folder: folder of the model.
        output: folder of the same model with columns of zeros.
        windows: file of the calibration tokens.
        progress: receives every step.
    """

    recipe: StructureRecipe
    folder: Path
    output: Path
    windows: Path
    progress: Progress

    def cut_width(self, plan: CutPlan) -> tuple[Cut, dict[str, Any], Path]:
        """Cut heads and neurons. Return the kept units, the record of the choice, and `output`."""
        recipe, allocation = self.recipe, self.recipe.allocation or "uniform"
        sizes = self.prune(lambda run: _of_width(run, recipe, plan), allocation)
        cut = self.cut()
        if allocation == "uniform":
            cut = Cut(
                groups=_evened(cut.groups, sizes.groups),
                neurons=_evened(cut.neurons, sizes.neurons),
            )
        return cut, self.notes() | {"allocation": allocation}, self.output

    def cut_queries(self, heads: int) -> tuple[Cut, dict[str, Any], Path]:
        """Cut query heads in every KV group. Return kept units, record of choice, and `output`."""
        sizes = self.prune(lambda run: _of_queries(run, heads), "uniform")
        cut = self.cut(kinds=("queries",))
        kept = {i: _evened_groups(heads, sizes, i, units) for i, units in cut.queries.items()}
        return Cut(queries=kept), self.notes(), self.output

    def prune(self, narrowed: Callable[[Prepared], Prepared], allocation: str) -> Sizes:
        """Prune, unless an earlier run made `output`. Return the sizes of the model."""
        recipe, output = self.recipe, self.output
        if not output.exists():
            folder = RunFolder(output, "prune", resume=True)
            values = _values_of(recipe, allocation) | {
                "model": str(self.folder),
                "output": str(output),
                "calibration": {"source": str(self.windows), "seed": recipe.calibration.seed},
            }
            meter, pruning = Meter.start(), build_recipe(PruneRecipe, values)
            source = source_of(pruning, self.progress)
            prepared = narrowed(prepare(pruning, source, folder.model))
            finish(Prune(prepared, Run(folder, source, self.progress, meter)))
        return sizes_of(build_skeleton(output, trust_remote_code=recipe.trust_remote_code))

    def cut(self, **kinds: Any) -> Cut:
        """The kept units of the pruned model."""
        trust = self.recipe.trust_remote_code
        return cut_from_zeros(CheckpointReader(self.output), trust_remote_code=trust, **kinds)

    def notes(self) -> dict[str, Any]:
        """The record of the choice."""
        return {"score": _score_of(self.recipe), "solver": self.recipe.solver}


def _values_of(recipe: StructureRecipe, allocation: str) -> dict[str, Any]:
    """The recipe of the pruning run that chooses units, without model, output and text."""
    return {
        "score": _score_of(recipe),
        "solver": recipe.solver,
        "method_parameters": recipe.method_parameters,
        "sparsity": 0.0,
        "allocation": allocation,
        "asymmetric": recipe.asymmetric,
        "fast_matmuls": recipe.fast_matmuls,
        "memory": recipe.memory.model_dump(),
        "device": recipe.device,
        "trust_remote_code": recipe.trust_remote_code,
    }


def _score_of(recipe: StructureRecipe) -> str | None:
    """The score of the recipe. With only a solver, this is the solver's own score."""
    if recipe.score is None and recipe.solver is not None:
        return solvers[recipe.solver].selects_by or "wanda"
    return recipe.score


def _of_width(prepared: Prepared, recipe: StructureRecipe, plan: CutPlan) -> Prepared:
    """A run over the linears that read heads and neurons."""
    target, model = prepared.target, prepared.target.model
    sizes, readers = sizes_of(model), consumers(model)
    starts = {f"*.{readers[k]}": x for k, x in width_shares(plan, sizes, model).items()}
    layer_name, cut = target.architecture.layer_name, plan.narrowed(sizes.layers)
    patterns = {
        f"*.{name}": parse_pattern(pattern_text(sizes, kind, recipe.multiple))
        for kind, name in readers.items()
    }
    return _over(
        prepared,
        {glob: share for glob, share in starts.items() if share > 0 or plan.joint is not None},
        patterns,
        _costs_of(layer_name, readers, sizes, model, recipe),
        tuple(f"{layer_name(i)}.*" for i in range(sizes.layers) if i not in cut),
    )


def _of_queries(prepared: Prepared, heads: int) -> Prepared:
    """A run over the linears that read query heads; it keeps so many of each group."""
    model = prepared.target.model
    sizes, reader = sizes_of(model), consumers(model)["groups"]
    each = sizes.heads_per_group
    pattern = parse_pattern(f"*x{unit_width(sizes, 'queries')}@{each}")
    return _over(prepared, {f"*.{reader}": 1 - heads / each}, {f"*.{reader}": pattern})


def _over(
    prepared: Prepared,
    starts: Mapping[str, float],
    patterns: Mapping[str, Pattern],
    costs: Mapping[str, int] | None = None,
    whole: tuple[str, ...] = (),
) -> Prepared:
    """The same run over linears that read units.

    Args:
        prepared: the run.
        starts: fraction of units to remove before any allocation, by glob of linears.
        patterns: patterns by glob of linears.
        costs: cost of a unit in the budget of an allocation, by linear.
        whole: globs of linears that keep all units.
    """
    selection = replace(prepared.selection, include=tuple(starts), exclude=whole, starts=starts)
    methods = {g: replace(prepared.method, pattern=pattern) for g, pattern in patterns.items()}
    return replace(prepared, selection=selection, methods=methods, costs=costs or {})


def _costs_of(
    layer_name: Callable[[int], str],
    readers: Mapping[str, str],
    sizes: Sizes,
    model: Any,
    recipe: StructureRecipe,
) -> dict[str, int]:
    """The cost of a unit of each linear in the budget of an allocation, in neurons.

    A group costs the number of neurons with as many parameters, rounded to a few levels of a
    search, so that groups and neurons are exchangeable.
    """
    costs, named = unit_costs(sizes, model), {}
    if "neurons" not in costs:
        return {}
    level = LEVEL * max(sizes.neurons)
    equal = costs.get("groups", 0) / costs["neurons"]
    levels = max(1, round(equal / level))
    step = max(1, round(equal / levels / recipe.multiple)) * recipe.multiple
    for kind, reader in readers.items():
        for layer, there in enumerate(getattr(sizes, kind)):
            if there:
                name = f"{layer_name(layer)}.{reader}"
                named[name] = recipe.multiple if kind == "neurons" else levels * step
    return named


def _evened(
    kept: Mapping[int, tuple[int, ...]], there: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """Keep the same number of units in each cut layer: the number in the layer that kept most.

    A layer keeps fewer if some of its units were already dead: their weights were zero before the
    choice. Some dead units stay, so that all layers have one size.
    """
    most = max(map(len, kept.values()), default=0)
    return {layer: _filled(units, range(there[layer]), most) for layer, units in kept.items()}


def _evened_groups(heads: int, sizes: Sizes, layer: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Keep the same number of query heads in each KV group of a layer; see `_evened`."""
    each = sizes.heads_per_group
    found: list[int] = []
    for start in range(0, sizes.queries[layer], each):
        group = range(start, start + each)
        found += _filled([head for head in kept if head in group], group, heads)
    return tuple(found)


def _filled(kept: Sequence[int], there: range, count: int) -> tuple[int, ...]:
    """Return `count` units: the kept ones, then the first of the others."""
    spare = [unit for unit in there if unit not in kept]
    return tuple(sorted([*kept, *spare[: count - len(kept)]]))


def plan_width_run(recipe: StructureRecipe, plan: CutPlan, folder: Path) -> PrunePlan:
    """Plan the pruning run that cuts heads and neurons, on the uncut model: the largest there is.

    Args:
        recipe: the user's recipe.
        plan: the plan of the cut.
        folder: folder of the uncut model.

    Raises:
        MemoryBudgetError: the run exceeds the budget.
    """
    values = _values_of(recipe, recipe.allocation or "uniform") | {
        "model": str(folder),
        "calibration": recipe.calibration.model_dump(),
    }
    pruning = build_recipe(PruneRecipe, values)
    prepared = prepare(pruning, source_of(pruning, Silent()), only_plan=True)
    prepared = _of_width(prepared, recipe, plan)
    return choose_plan(prepared, prepared.tasks(), recipe.memory)[0]


@dataclass(frozen=True)
class Size:
    """A timed candidate.

    Attributes:
        kept: target fraction of the parameters of heads and neurons; whole units come as near as
            possible.
        groups: maximum number of KV groups in a layer.
        neurons: maximum number of FFN neurons in a layer.
        milliseconds: time of a token.
        milliseconds_uncut: time of a token in the uncut model, in the same turns.
    """

    kept: float
    groups: int
    neurons: int
    milliseconds: float
    milliseconds_uncut: float

    @property
    def left(self) -> float:
        """The fraction of the uncut model's time."""
        return self.milliseconds / self.milliseconds_uncut


@dataclass(frozen=True)
class SizeSearch:
    """The inputs for making and timing sizes.

    Attributes:
        plan: the plan of the other cuts.
        uncut: skeleton of the uncut model.
        narrowable: the model after the other cuts.
        multiple: the number of kept neurons is a multiple of this.
        device: where a token is timed.
        timer: measures the time of a token.
        progress: receives every turn.
    """

    plan: CutPlan
    uncut: Any
    narrowable: Any
    multiple: int
    device: torch.device
    timer: StepTimer
    progress: Progress

    @property
    def alone(self) -> bool:
        """Whether only heads and neurons are cut."""
        plan = self.plan
        others = plan.keep_experts, plan.keep_hidden, plan.keep_queries
        return not plan.drop_layers and others == (None, None, None)

    def timed(
        self, fractions: Sequence[float], known: Collection[Size] = ()
    ) -> tuple[list[Size], int]:
        """Time sizes, largest first, and each number of units once.

        Args:
            fractions: fractions of heads and neurons to keep. Sizes that whole units cannot make
                are skipped.
            known: sizes that are already timed; skipped too.

        Returns:
            The sizes, and how many tokens were in the cache.
        """
        before = {(size.groups, size.neurons) for size in known}
        made: dict[tuple[int, int], tuple[float, Any]] = {}
        for kept in fractions:
            try:
                cut = uniform_cut(
                    replace(self.plan, joint=1 - kept), self.narrowable, self.multiple
                )
            except RecipeError:  # the size is too small for whole units
                continue
            skeleton = design(self.narrowable, cut).skeleton
            sizes = sizes_of(skeleton)
            narrowed = self.plan.narrowed(sizes.layers)
            units = (
                max(sizes.groups[i] for i in narrowed),
                max(sizes.neurons[i] for i in narrowed),
            )
            if units not in before:
                made.setdefault(units, (kept, skeleton))
        if not made:
            return [], 0
        skeletons = [skeleton for _, skeleton in made.values()]
        found = self.timer([self.uncut, *skeletons], self.device, self.progress)
        uncut, *seconds = found.seconds
        return [
            Size(kept, *units, 1e3 * each, 1e3 * uncut)
            for (units, (kept, _)), each in zip(made.items(), seconds, strict=True)
        ], found.context_tokens


def find_latency(
    recipe: StructureRecipe,
    plan: CutPlan,
    model: Any,
    device: torch.device,
    timer: StepTimer,
    progress: Progress,
    kept: Path,
) -> dict[str, Any]:
    """Find the largest size that meets the target, and return all measurements.

    Args:
        recipe: recipe with a target in time.
        plan: the plan of the other cuts, with all heads and neurons.
        model: the uncut skeleton.
        device: where a token is timed.
        timer: measures the time of a token.
        progress: receives every turn.
        kept: file of the result; a stopped run may have written it.

    Returns:
        The record for the manifest; `joint` is the fraction of heads and neurons to remove.

    Raises:
        RecipeError: no size meets the target, or the other cuts alone meet it.
    """
    if kept.exists():
        measured: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return measured
    assert recipe.decode_latency is not None
    search = SizeSearch(
        plan,
        design(model, Cut()).skeleton,
        design(model, representative(plan)).skeleton,
        recipe.multiple,
        device,
        timer,
        progress,
    )
    best, sizes, context = _largest(search, recipe.decode_latency)
    found: dict[str, Any] = {
        "target": recipe.decode_latency,
        "joint": 1 - best.kept,
        "milliseconds_before": best.milliseconds_uncut,
        "milliseconds_after": best.milliseconds,
        "batch": 1,
        "context_tokens": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "candidates": [asdict(size) for size in sizes],
    }
    write_json(kept, found)
    return found


def _largest(search: SizeSearch, target: float) -> tuple[Size, list[Size], int]:
    """The largest size within the target, all timed sizes, and the length of the context."""
    sizes, context = search.timed(FIRST if search.alone else (1.0, *FIRST))
    within = [size for size in sizes if size.left <= target]
    if not within:
        raise _beyond_reach(target, sizes)
    best = within[0]
    if best.kept == 1:
        raise RecipeError(
            f"a token is to take {target:.0%} of its time; with all heads and neurons it takes "
            f"{best.left:.1%}",
            remedy="leave the target out, or choose a smaller one",
        )
    timed, above = list(sizes), next((s.kept for s in reversed(sizes) if s.kept > best.kept), 1.0)
    for _ in range(PASSES - 1):
        step = (above - best.kept) / (BETWEEN + 1)
        sizes, _ = search.timed([above - step * (i + 1) for i in range(BETWEEN)], timed)
        timed += sizes
        best = max((s for s in timed if s.left <= target), key=lambda size: size.kept)
        above = min((s.kept for s in timed if s.kept > best.kept), default=1.0)
    return best, sorted(timed, key=lambda size: -size.kept), context


def _beyond_reach(target: float, sizes: Sequence[Size]) -> RecipeError:
    """The error that no size meets the target. It names the smallest measured size."""
    if not sizes:
        return RecipeError(
            "heads and neurons cannot be cut to any size between a tenth and all of them",
            remedy="choose a smaller --multiple, or drop layers: --keep-layers",
        )
    least = sizes[-1]
    return RecipeError(
        f"a token is to take {target:.0%} of its time; with {least.groups} KV groups and "
        f"{least.neurons} neurons a layer, the smallest size measured, it takes {least.left:.1%} "
        f"({least.milliseconds:.2f} of {least.milliseconds_uncut:.2f} ms)",
        remedy="ask for more than that, or drop layers too: --keep-layers",
    )
