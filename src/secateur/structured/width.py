"""Chooses heads and neurons with a pruning run; the pattern is whole columns.

The linear that reads the heads (output projection) and the linear that reads the neurons (down
projection) lose whole columns. The run selects and compensates them layer by layer on pruned
activations, as for any linear. The rows that produced these columns are then unused and are cut
as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.engine.plan_memory import PrunePlan
from secateur.engine.prepared import Prepared, choose_plan, prepare
from secateur.engine.stream.targets import Target
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import resolve
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.sparsity.patterns import Pattern, parse_pattern
from secateur.sparsity.solvers import solvers
from secateur.structured.cut import Cut, Sizes, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import (
    CutPlan,
    pattern_text,
    unit_costs,
    width_shares,
)
from secateur.structured.surgery import cut_from_zeros

LEVEL = 0.05
"""The approximate fraction of a layer's neurons in one level of a searched allocation."""


def pruning_values(recipe: StructureRecipe, allocation: str) -> dict[str, Any]:
    """The recipe of the pruning run that chooses units, without model, output and text."""
    return {
        "score": score_of(recipe),
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


def score_of(recipe: StructureRecipe) -> str | None:
    """The score of the recipe. With only a solver, this is the solver's own score."""
    if recipe.score is None and recipe.solver is not None:
        return solvers[recipe.solver].selects_by or "wanda"
    return recipe.score


@dataclass(frozen=True)
class UnitSelection:
    """A pruning that removes whole units, from the linears that read them.

    Attributes:
        shares: fraction of units to remove before any allocation, by glob of linears.
        patterns: patterns by glob of linears.
        costs: cost of a unit in the budget of an allocation, by linear.
        whole: globs of linears that keep all units.
    """

    shares: Mapping[str, float]
    patterns: Mapping[str, Pattern]
    costs: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def applied(self, prepared: Prepared) -> Prepared:
        """The same run over the linears that read units."""
        linears = replace(
            prepared.selection, include=tuple(self.shares), exclude=self.whole, starts=self.shares
        )
        methods = {g: replace(prepared.method, pattern=x) for g, x in self.patterns.items()}
        return replace(prepared, selection=linears, methods=methods, costs=self.costs)


def width_selection(target: Target, recipe: StructureRecipe, plan: CutPlan) -> UnitSelection:
    """The selection of heads and neurons of a model."""
    model, layer_name = target.model, target.architecture.layer_name
    sizes, readers = sizes_of(model), consumers(model)
    shares = width_shares(plan, sizes, model).items()
    cut_kinds = {kind: x for kind, x in shares if x > 0 or plan.joint is not None}
    cut = plan.narrowed(sizes.layers)
    return UnitSelection(
        {f"*.{readers[kind]}": x for kind, x in cut_kinds.items()},
        {
            f"*.{readers[kind]}": parse_pattern(pattern_text(sizes, kind, recipe.multiple))
            for kind in cut_kinds
        },
        _costs_of(layer_name, readers, sizes, model, recipe),
        tuple(f"{layer_name(i)}.*" for i in range(sizes.layers) if i not in cut),
    )


def query_selection(target: Target, heads: int) -> UnitSelection:
    """The selection that keeps so many query heads of each KV group of a model."""
    sizes, reader = sizes_of(target.model), consumers(target.model)["groups"]
    each = sizes.heads_per_group
    pattern = parse_pattern(f"*x{unit_width(sizes, 'queries')}@{each}")
    return UnitSelection({f"*.{reader}": 1 - heads / each}, {f"*.{reader}": pattern})


def kept_width(pruned: CheckpointReader, even: bool, trust: bool) -> Cut:
    """The heads and neurons that stay in a model with columns of zeros.

    Args:
        pruned: the model.
        even: whether each cut layer keeps the same number: that of the layer that kept most. A
            layer keeps fewer if some of its units were already dead: their weights were zero
            before the choice. Some dead units stay, so that all layers have one size.
        trust: whether code from the folder may run.
    """
    cut = cut_from_zeros(pruned, trust_remote_code=trust)
    if not even:
        return cut
    sizes = sizes_of(build_skeleton(pruned.folder, trust_remote_code=trust))

    def evened(kept: Mapping[int, tuple[int, ...]], there: tuple[int, ...]) -> dict[int, Any]:
        most = max(map(len, kept.values()), default=0)
        return {layer: _filled(units, range(there[layer]), most) for layer, units in kept.items()}

    return Cut(groups=evened(cut.groups, sizes.groups), neurons=evened(cut.neurons, sizes.neurons))


def kept_queries(pruned: CheckpointReader, heads: int, trust: bool) -> Cut:
    """The query heads that stay in a model with columns of zeros: so many in each KV group.

    Args:
        pruned: the model.
        heads: of each group. Dead ones fill up a group, as in `kept_width`.
        trust: whether code from the folder may run.
    """
    cut = cut_from_zeros(pruned, kinds=("queries",), trust_remote_code=trust)
    sizes = sizes_of(build_skeleton(pruned.folder, trust_remote_code=trust))
    found: dict[int, tuple[int, ...]] = {}
    for layer, kept in cut.queries.items():
        starts = range(0, sizes.queries[layer], sizes.heads_per_group)
        groups = [range(start, start + sizes.heads_per_group) for start in starts]
        found[layer] = tuple(
            head for g in groups for head in _filled([x for x in kept if x in g], g, heads)
        )
    return Cut(queries=found)


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


def _filled(kept: Sequence[int], there: range, count: int) -> tuple[int, ...]:
    """Return `count` units: the kept ones, then the first of the others."""
    spare = [unit for unit in there if unit not in kept]
    return tuple(sorted([*kept, *spare[: count - len(kept)]]))


def plan_width_run(recipe: StructureRecipe, plan: CutPlan, folder: Path) -> PrunePlan:
    """Plan the pruning run that cuts heads and neurons, on the uncut model: the largest there is.

    Raises:
        MemoryBudgetError: the run exceeds the budget.
    """
    values = pruning_values(recipe, recipe.allocation or "uniform") | {
        "model": str(folder),
        "calibration": recipe.calibration.model_dump(),
    }
    pruning = build_recipe(PruneRecipe, values)
    trust = recipe.trust_remote_code
    source = resolve(pruning.model, dtype=pruning.dtype, trust_remote_code=trust)
    prepared = prepare(pruning, source, only_plan=True)
    prepared = width_selection(prepared.target, recipe, plan).applied(prepared)
    return choose_plan(prepared, prepared.tasks(), recipe.memory)[0]
