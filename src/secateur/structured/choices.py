"""Chooses the units that stay: layers, experts, channels, query heads, KV groups and neurons.

Several processes can share the survey of experts. The first one sends a job; the others open the
same model and pass their own calibration windows through it. All sums are added up. Everything
else, which takes seconds, is done by the first process while the others wait.

Heads and neurons are chosen by a pruning run whose pattern is whole columns. The linear that reads
the heads (output projection) and the linear that reads the neurons (down projection) lose whole
columns. The run selects and compensates them layer by layer on pruned activations, as for any
linear. The rows that produced these columns are then unused and are cut as well.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from secateur.calibration.windows import load_windows
from secateur.engine.plan_memory import PrunePlan
from secateur.engine.prepared import Prepared, choose_plan, prepare
from secateur.engine.prune.tasks import Settings
from secateur.engine.search import experts as survey
from secateur.engine.search.channels import hidden_scores
from secateur.engine.search.depth import choose_depth
from secateur.engine.search.expert_divergence import (
    REMOVED,
    TOKENS,
    divergence_scores,
    removals,
)
from secateur.engine.search.sensitivity import ChangedAlone, Ways
from secateur.engine.search.survey import LayerView, Survey, grains_of
from secateur.errors import RecipeError
from secateur.models import checkpoint, opening, skeleton, sources
from secateur.models.architecture import describe
from secateur.models.expert_layout import Experts
from secateur.models.experts import OpenExperts
from secateur.models.inventory import FurtherLayers
from secateur.models.sources import LocalCheckpoint
from secateur.models.targets import CheckpointTarget, Target, walk_layers
from secateur.parallel.ranks import Ranks, refuse_another_disk, refuse_another_model
from secateur.progress import Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.runs.environment import choose_device
from secateur.sparsity.methods import Method, compose
from secateur.sparsity.patterns import Pattern, parse_pattern
from secateur.sparsity.solvers import solvers
from secateur.structured.cut import NEURONS, Cut, Kept, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import (
    CutPlan,
    counts_left,
    pattern_text,
    representative,
    unit_costs,
    width_shares,
    with_target,
)
from secateur.structured.cut_steps import ChangeOfRun, CutContext, Found
from secateur.structured.design import design
from secateur.structured.surgery import cut_from_zeros

log = logging.getLogger(__name__)


def choose_layers(context: CutContext, folder: Path) -> Found:
    """Choose the decoder layers to remove."""
    by, layers = context.recipe.depth.by, range(context.plan.sizes.layers)
    dropped = choose_depth(
        context.target(folder),
        context.windows,
        context.plan.drop_layers,
        context.scratch("depth"),
        context.progress,
        method=by,
        fast_matmuls=context.recipe.fast_matmuls,
    )
    notes = {"by": by, "units": "layers", "fitness": dropped.fitness, "scores": dropped.scores}
    return Cut(layers=tuple(i for i in layers if i not in dropped.layers)), notes, folder


def choose_hidden(context: CutContext, folder: Path) -> Found:
    """Choose the channels of the residual stream to keep: the largest in the outputs of norms."""
    target = context.target(folder)
    assert context.plan.keep_hidden is not None
    settings = Settings(
        micro_batch_tokens=context.recipe.memory.micro_batch_tokens,
        fast_matmuls=context.recipe.fast_matmuls,
        work=context.scratch("hidden"),
    )
    hidden = context.plan.sizes.hidden
    scores = hidden_scores(target, context.windows, settings, hidden, context.progress)
    # Stable: of equally large channels those of lower index stay.
    order = scores.argsort(descending=True, stable=True)[: context.plan.keep_hidden]
    return Cut(hidden=tuple(sorted(order.tolist()))), {"by": "activation norms"}, folder


def choose_experts(context: CutContext, folder: Path) -> Found:
    """Choose the experts to keep, or keep those that the plan names."""
    target, recipe = context.target(folder), context.recipe
    config, experts = target.model.config, target.architecture.experts
    assert experts is not None
    fewest, groups = experts.fewest(config), experts.divided(config)
    if context.plan.named is not None:
        by = "divergence" if recipe.experts_list is None else "list"
        named, order = context.plan.named, context.kept("depth", "layers")
        order = range(len(target.layers)) if order is None else order
        kept = {new: named[old] for new, old in enumerate(order) if old in named}
        notes: dict[str, Any] = {"by": by}
    else:
        by, scores, noted = recipe.experts_by, *_expert_scores(context, target)
        keep = context.plan.keep_experts
        assert keep is not None
        kept = survey.best_experts(
            scores, keep, fewest, groups=groups, scope=recipe.experts_scope, nats=by == "divergence"
        )
        use = {str(layer): noted.get(layer, {by: x.tolist()}) for layer, x in scores.items()}
        notes = {"by": by, "scope": recipe.experts_scope, "use": use}
    # no forward of the model reaches layers for further tokens, so their weights decide
    most, layers = max(map(len, kept.values())), FurtherLayers.of(target.model, target.architecture)
    further = {
        layer: torch.tensor([survey.aimer(map(target.reader.read, own[e])) for e in sorted(own)])
        for layer, own in layers.experts(experts, target.reader.entries).items()
        if len(own) >= most
    }
    predicting = survey.best_experts(further, most, fewest, groups=groups) if further else {}
    return Cut(experts=kept, predicting=predicting), notes, folder


def _expert_scores(
    context: CutContext, target: CheckpointTarget
) -> tuple[dict[int, torch.Tensor], dict[int, dict[str, Any]]]:
    """The scores of all experts by number of the layer, and what else is noted of them."""
    recipe, progress = context.recipe, context.progress
    if recipe.experts_by == "aimer":
        return survey.aimer_scores(target, progress), {}
    if recipe.experts_by == "divergence":
        work, fast = context.scratch("experts"), recipe.fast_matmuls
        return divergence_scores(target, context.windows, work, progress, fast=fast), {}
    tokens = recipe.memory.micro_batch_tokens
    # The other processes need the windows that this one reads, and the digest of its weights.
    job = {"windows": str(context.windows_file), "source": target.reader.tensor_digest}
    context.ranks.once(lambda: job)
    each = survey.expert_use(target, context.windows, tokens, progress, context.ranks)
    scores = survey.scores_of(each, recipe.experts_by, recipe.calibration.seed)
    return scores, {layer: own.to_json() for layer, own in each.items()}


def share_survey(recipe: StructureRecipe, source: LocalCheckpoint, ranks: Ranks) -> None:
    """Survey the share of a process that is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        source: the model that it names.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    while (job := ranks.once(lambda: None)) is not None:
        file = Path(job["windows"])
        if not file.exists():
            refuse_another_disk(ranks.rank, file)
        reader = opening.open_weights(source.folder)
        if reader.tensor_digest != job["source"]:
            refuse_another_model(ranks.rank, source.folder)
        target = CheckpointTarget(reader, None, choose_device(recipe.device))
        tokens = recipe.memory.micro_batch_tokens
        survey.expert_use(target, load_windows(file), tokens, Silent(), ranks)


PROBES = (0.25, 0.5)
"""The survey of a cut removes so much of the units of each linear that reads some, alone."""

SHARES = (15 / 16, 7 / 8, 13 / 16, 3 / 4, 11 / 16, 5 / 8, 9 / 16, 1 / 2)
"""Of the experts of a layer, that may stay where a budget decides."""


COSTS = (0.75, 1.3)
"""What cuts of experts, and of other units, cost after their tuning, over what the survey says. Set
by hand from one trained mixture of four layers of 16 experts (0.64 to 0.85 for experts, 1.26 and
1.42 for neurons, from a quarter to a half of them); another model may have others. Tuning makes up
for experts; units of many linears go together, and the survey removes those of one."""


@dataclass(frozen=True)
class CutLosses:
    """What the divergence from the dense model rises when experts, neurons or heads go, in nats.

    Units other than experts are removed by their OBS score, and the others make up for them by
    least squares. In between, and further, the divergence without a share s of the units is a power
    of s: half · (2 s)^p with 2^p = half / quarter. Sums are multiplied by what cuts have cost after
    their tuning, over what the survey said (`COSTS`).

    Attributes:
        experts: of each expert of a layer after all that cost less, by number of the layer.
        units: of each linear that reads units without the `PROBES` of them, by its name.
    """

    experts: Mapping[str, Sequence[float]]
    units: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Any]]) -> CutLosses:
        """From what `ChangedAlone` has found with `removals` and the ways of `without_units`."""
        first, _ = ways = [f"{share:g}" for share in PROBES]
        return cls(
            {layer: own[REMOVED] for layer, own in found.items() if REMOVED in own},
            {name: [own[way] for way in ways] for name, own in found.items() if first in own},
        )

    def best(self, keep: int, experts: Experts, config: Any, scope: str) -> dict[int, Kept]:
        """The experts whose removal costs least; `keep` in each layer, or on average."""
        scores = {int(n): torch.tensor(own, dtype=torch.float64) for n, own in self.experts.items()}
        fewest, groups = experts.fewest(config), experts.divided(config)
        return survey.best_experts(scores, keep, fewest, groups=groups, scope=scope, nats=True)

    def of_experts(self, kept: Mapping[int, Sequence[int]]) -> float:
        """Without all experts but these of each layer."""
        return COSTS[0] * sum(
            sum(own) - sum(own[expert] for expert in kept[int(layer)])
            for layer, own in self.experts.items()
        )

    def of_units(self, share: float, reader: str = "*") -> float:
        """Without this share of the units of all linears of a glob."""
        own = [x for name, x in self.units.items() if fnmatchcase(name, reader)]
        quarter, half = (sum(each) for each in zip(*own, strict=True)) if own else (0.0, 0.0)
        power = max(1.0, math.log2(half / quarter)) if quarter > 0 else 2.0
        return COSTS[1] * half * (share / PROBES[1]) ** power

    def of_shares(self, gone: Mapping[str, float], model: Any) -> float:
        """Without these shares of the units of each kind."""
        readers = consumers(model)
        return sum(self.of_units(share, f"*.{readers[kind]}") for kind, share in gone.items())


NO_CUTS = CutLosses({}, {})
"""Where nothing was surveyed."""


def readers_of(model: Any, kinds: Iterable[str]) -> dict[str, Method]:
    """What removes units of the kinds that can go, by the globs of the linears that read them."""
    couplings = describe(model).couplings
    if couplings is None:
        return {}
    sizes, names = sizes_of(model), consumers(model)
    return {
        f"*.{names[kind]}": compose(
            None, f"*x{unit_width(sizes, kind)}", score="obs", solver="least-squares"
        )
        for kind in kinds
        if kind in names and kind not in couplings.fixed and any(getattr(sizes, kind))
    }


def without_units(view: LayerView, readers: Mapping[str, Method]) -> Ways:
    """Ŵ − W of the linears of a layer that read units, without the `PROBES` of them."""
    own = {n: how for n in view.weights for glob, how in readers.items() if fnmatchcase(n, glob)}
    return {
        name: {f"{x:g}": view.solved(name, how, x) - view.weights[name] for x in PROBES}
        for name, how in own.items()
    }


def expert_counts(model: Any, shares: Iterable[float]) -> list[int]:
    """How many experts may stay in each layer, ascending; none where none can go.

    Args:
        model: its skeleton is enough.
        shares: of them that are asked for.
    """
    experts, there = describe(model).experts, min(filter(None, sizes_of(model).experts), default=0)
    if experts is None:
        return []
    fewest, groups = experts.fewest(model.config), experts.divided(model.config)
    tried = {round(there * share) for share in shares}
    return [x for x in sorted(tried) if fewest <= x < there and not x % groups]


def one_budget(context: CutContext) -> CutPlan:
    """The plan of a target that names the experts whose removal leaves least to lose.

    With fewer experts, fewer heads and neurons have to go. Of some numbers of experts (`SHARES`)
    that one is taken with which experts, heads and neurons together are predicted to lose least.
    """
    recipe, model = context.recipe, skeleton.build_skeleton(context.source)
    experts = describe(model).experts
    assert experts is not None
    losses, there = _survey_cuts(context, model), max(context.plan.sizes.experts)
    best, least = context.plan, math.inf
    for keep in (there, *reversed(expert_counts(model, SHARES))):
        kept = losses.best(keep, experts, model.config, recipe.experts_scope)
        try:
            named = replace(context.plan, named=kept if keep < there else None)
            plan = with_target(named, recipe, model)
            left = design(model, representative(plan)).skeleton
            gone = width_shares(plan, sizes_of(left), left, recipe.multiple)
        except RecipeError:  # too few, or too many, heads and neurons would have to go
            continue
        if (lost := losses.of_experts(kept) + losses.of_shares(gone, model)) < least:
            best, least = plan, lost
    return best


def _survey_cuts(context: CutContext, model: Any) -> CutLosses:
    """What experts, heads and neurons cost, by one forward and one backward of the uncut model."""
    readers, work = readers_of(model, ("groups", *NEURONS)), context.scratch("survey")
    values = _pruning_values(context.recipe, "divergence") | {
        "model": str(context.source), "output": str(work), "score": "obs",
        "solver": "least-squares", "method_parameters": {}, "asymmetric": False,
        "calibration": {"source": str(context.windows_file)},
    }  # fmt: skip
    recipe = build_recipe(PruneRecipe, values)
    source = sources.resolve(str(context.source), trust_remote_code=recipe.trust_remote_code)
    cut = {glob: (PROBES[-1], how.pattern) for glob, how in readers.items()}
    opened = _over_units(prepare(recipe, source), cut)
    tasks, settings = opened.tasks(), Settings.of(recipe, "disk", work)
    walk = Survey(opened.target, tasks, opened.stream(settings), settings, context.progress)
    alone = ChangedAlone(
        walk, TOKENS, walk.statistics_for(opened.allocation), grains_of(tasks, opened.allocation),
        partial(without_units, readers=readers),
    )  # fmt: skip
    alone.others = removals(alone.drawn)
    return CutLosses.of(alone.divergences("surveying experts and neurons"))


LEVEL = 0.05
"""The approximate fraction of a layer's neurons in one level of a searched allocation."""


def _pruning_values(recipe: StructureRecipe, allocation: str) -> dict[str, Any]:
    """The recipe of the pruning run that chooses units, without model, output and text."""
    same = {"solver", "method_parameters", "asymmetric", "fast_matmuls", "memory", "device"}
    given = recipe.model_dump(include={*same, "trust_remote_code"})
    return given | {"score": _score_of(recipe), "sparsity": 0.0, "allocation": allocation}


def _score_of(recipe: StructureRecipe) -> str | None:
    """The score of the recipe. With only a solver, this is the solver's own score."""
    if recipe.score is None and recipe.solver is not None:
        return solvers[recipe.solver].selects_by or "wanda"
    return recipe.score


def _over_units(
    prepared: Prepared,
    cut: Mapping[str, tuple[float, Pattern]],
    whole: tuple[str, ...] = (),
    alike: Sequence[str] = (),
) -> Prepared:
    """The same run over the linears that read units, from which it removes whole ones.

    Args:
        prepared: a run that is ready.
        cut: fraction of units to remove before any allocation, and the pattern, by glob of linears.
        whole: globs of linears that keep all units.
        alike: those of the globs whose linears lose equally many, so that no allocation moves them.
    """
    shares = {glob: share for glob, (share, _) in cut.items()}
    linears = replace(prepared.selection, include=tuple(shares), exclude=whole, starts=shares)
    linears = replace(linears, overrides={glob: shares[glob] for glob in alike})
    methods = {
        glob: replace(prepared.method, pattern=pattern) for glob, (_, pattern) in cut.items()
    }
    return replace(prepared, selection=linears, methods=methods)


def over_width(prepared: Prepared, recipe: StructureRecipe, plan: CutPlan) -> Prepared:
    """The same run over the linears that read heads and neurons."""
    model, layer_name = prepared.target.model, prepared.target.architecture.layer_name
    sizes, readers = sizes_of(model), consumers(model)
    # With a joint target the allocation divides it, so a kind that begins with 0 takes part.
    cut = {
        f"*.{readers[kind]}": (x, parse_pattern(pattern_text(sizes, kind, recipe.multiple)))
        for kind, x in width_shares(plan, sizes, model, recipe.multiple).items()
        if x > 0 or plan.joint is not None
    }
    narrowed = plan.narrowed(sizes.layers)
    whole = tuple(f"{layer_name(i)}.*" for i in range(sizes.layers) if i not in narrowed)
    alike = {f"*.{readers[kind]}" for kind in readers.keys() & ALIKE}
    opened = _over_units(prepared, cut, whole, [glob for glob in cut if glob in alike])
    return replace(opened, costs=_costs_of(prepared.target, recipe.multiple))


ALIKE = ("shared_neurons", "expert_neurons")
"""The kinds of units of which all layers keep the same number, whatever the allocation."""


def choose_width(context: CutContext, folder: Path) -> Found:
    """Choose the heads and neurons to keep, and refit their readers in a folder.

    With a uniform allocation each cut layer keeps the same number, and experts do with any. A layer
    keeps fewer if some of its units were already dead: their weights were zero before the choice.
    Some dead units stay, so that all layers have one size.
    """
    recipe, plan, made = context.recipe, context.plan, context.work / "narrowed"
    allocation = recipe.allocation or "uniform"
    over = partial(over_width, recipe=recipe, plan=plan)
    _prune_units(context, folder, made, allocation, over)
    model = skeleton.build_skeleton(made)
    sizes, counts = sizes_of(model), counts_left(plan, model, recipe.multiple)
    kinds = ("groups", "neurons", "shared_neurons")
    cut = cut_from_zeros(checkpoint.CheckpointReader(made), kinds=kinds)
    how: dict[str, Any] = {
        "score": _score_of(recipe), "solver": recipe.solver, "allocation": allocation,
    }  # fmt: skip
    for kind in kinds if allocation == "uniform" else ("shared_neurons",):
        filled: Any = {
            layer: _filled(getattr(cut, kind).get(layer, ()), range(getattr(sizes, kind)[layer]), n)
            for layer, n in counts[kind].items()
        }
        cut = replace(cut, **{kind: filled})
    if counts["expert_neurons"]:
        kept, by_weights = _neurons_of_experts(context.target(made), counts["expert_neurons"])
        cut = replace(cut, expert_neurons=kept)
        if by_weights:
            how["by_weights"] = by_weights
            log.warning(
                "neurons of experts that no token reached are chosen by their weights: %s",
                "; ".join(f"layer {i}: {own}" for i, own in by_weights.items()),
            )
    return cut, how, made


@torch.no_grad()
def _neurons_of_experts(
    target: CheckpointTarget, counts: Mapping[int, int]
) -> tuple[dict[int, tuple[tuple[int, ...], ...]], dict[str, list[int]]]:
    """The neurons of every expert that a pruned model reads.

    An expert that no token reached has all its neurons. Of it those stay whose weights are largest:
    the product of the norms of what they have in gate, up and down.

    Args:
        target: the pruned model, with opened experts.
        counts: how many stay in each expert, by layer.

    Returns:
        The kept neurons of each expert, by layer; and the experts that were chosen by weights.
    """
    found, by_weights = dict[int, tuple[tuple[int, ...], ...]](), dict[str, list[int]]()
    experts = target.architecture.experts
    assert experts is not None
    for index, layer in walk_layers(target, sorted(counts)):
        kept, number = [], counts[index]
        for e, expert in enumerate(cast("OpenExperts", layer.get_submodule(experts.module))):
            *first, down = (p.float() for p in expert.parameters() if p.ndim > 1)
            used = down.any(0).nonzero().flatten().tolist()
            if len(used) > number:
                size = down.norm(dim=0)
                for rows in first:
                    size *= rows.norm(dim=1)
                used = size.argsort(descending=True, stable=True)[:number].tolist()
                by_weights.setdefault(str(index), []).append(e)
            kept.append(_filled(used, range(down.shape[1]), number))
        found[index] = tuple(kept)
    return found, by_weights


def choose_queries(context: CutContext, folder: Path) -> Found:
    """Choose the query heads to keep in each KV group, and refit their readers in a folder.

    Dead ones fill up a group, as in `choose_width`.
    """
    recipe, heads, made = context.recipe, context.plan.keep_queries, context.work / "thinned"
    assert heads is not None

    def over_heads(prepared: Prepared) -> Prepared:
        model = prepared.target.model
        sizes, reader = sizes_of(model), f"*.{consumers(model)['groups']}"
        each = sizes.heads_per_group
        # As wide as a query head, as many among those of each KV group.
        pattern = parse_pattern(f"*x{unit_width(sizes, 'queries')}@{each}")
        return _over_units(prepared, {reader: (1 - heads / each, pattern)})

    _prune_units(context, folder, made, "uniform", over_heads)
    cut = cut_from_zeros(checkpoint.CheckpointReader(made), kinds=("queries",))
    sizes = sizes_of(skeleton.build_skeleton(made))
    found: dict[int, tuple[int, ...]] = {}
    for layer, kept in cut.queries.items():
        starts = range(0, sizes.queries[layer], sizes.heads_per_group)
        groups = [range(start, start + sizes.heads_per_group) for start in starts]
        found[layer] = tuple(
            head for g in groups for head in _filled([x for x in kept if x in g], g, heads)
        )
    return Cut(queries=found), {"score": _score_of(recipe), "solver": recipe.solver}, made


def _prune_units(
    context: CutContext, folder: Path, made: Path, allocation: str, over: ChangeOfRun
) -> None:
    """Prune whole units of a model folder into another, unless an earlier run did."""
    if made.exists():
        return
    text = {"source": str(context.windows_file), "seed": context.recipe.calibration.seed}
    values = {"model": str(folder), "output": str(made), "calibration": text}
    recipe = build_recipe(PruneRecipe, _pruning_values(context.recipe, allocation) | values)
    context.prune(recipe, over)


def _costs_of(target: Target, multiple: int) -> dict[str, int]:
    """The cost of a unit of each linear in the budget of an allocation, in neurons.

    A group costs the number of neurons with as many parameters, rounded to a few levels of a
    search, so that groups and neurons are exchangeable.
    """
    sizes, readers = sizes_of(target.model), consumers(target.model)
    costs, named = unit_costs(sizes, target.model), {}
    if "neurons" not in costs:
        return {}
    level = LEVEL * max(sizes.neurons)  # in neurons
    equal = costs.get("groups", 0) / costs["neurons"]  # neurons with a group's parameters
    # A group is worth a whole number of levels, so that the search can trade it for neurons.
    levels = max(1, round(equal / level))
    step = max(1, round(equal / levels / multiple)) * multiple
    for kind in readers.keys() - ALIKE:
        for layer, there in enumerate(getattr(sizes, kind)):
            if there:
                name = f"{target.architecture.layer_name(layer)}.{readers[kind]}"
                named[name] = multiple if kind == "neurons" else levels * step
    return named


def _filled(kept: Sequence[int], there: range, count: int) -> tuple[int, ...]:
    """Return `count` units: the kept ones, then the first of the others."""
    # Dead units: their weights were 0 before, so any of them will do.
    spare = [unit for unit in there if unit not in kept]
    return tuple(sorted([*kept, *spare[: count - len(kept)]]))


def plan_width_run(recipe: StructureRecipe, plan: CutPlan, folder: Path) -> PrunePlan:
    """Plan the pruning run that cuts heads and neurons, on the uncut model: the largest there is.

    Raises:
        MemoryBudgetError: the run exceeds the budget.
    """
    values = _pruning_values(recipe, recipe.allocation or "uniform") | {
        "model": str(folder),
        "calibration": recipe.calibration.model_dump(),
    }
    pruning = build_recipe(PruneRecipe, values)
    source = sources.resolve(
        pruning.model, dtype=pruning.dtype, trust_remote_code=recipe.trust_remote_code
    )
    prepared = over_width(prepare(pruning, source, only_plan=True), recipe, plan)
    return choose_plan(prepared, prepared.tasks(), recipe.memory)[0]
