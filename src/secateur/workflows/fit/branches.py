"""Structure as branches of a fit: models with fewer layers or neurons.

A branch is cut by `secateur structure` with the preset of the fit, which also refits or teaches
what is left. It takes the survey of the uncut model over: a linear keeps its rise, times its share
of weights. So a branch needs no levels of its own, and its candidate for the budget is known at
once:

    expected = divergence of the branch alone + rises of its linears

It is made only if that is less than what the best model without a cut has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from secateur.engine.choose.budgeted import Cost, Menu
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.recipes.fit import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.results.fit import FitBranch, FitFinalist
from secateur.runs.folder import NOTES
from secateur.workflows.compress.packable import PackableMatrix, find_matrices
from secateur.workflows.fit.bounds import as_seen, other_bytes, size_of
from secateur.workflows.fit.costs import Costs, costs_of
from secateur.workflows.fit.finalists import Finalist
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.levels import linear_bytes
from secateur.workflows.fit.making import made, shared, trust
from secateur.workflows.fit.yardstick import Yardstick
from secateur.workflows.structure.checkpoint import STEPS, structure_recipe
from secateur.workflows.structure.cut_plan import CutPlan, aim_of

Inherited = Mapping[str, tuple[tuple[Cost, ...], tuple[float, ...]]]
"""Costs and rises on every level of the linears of the uncut model, by name."""

WORTH = 0.1
"""Nats per token. Where the best model without a cut is this near, no cut is tried. On SmolLM2, any
cut of a tenth of the decoder costs at least 0.2 (docs/structure/README.md)."""


@dataclass(frozen=True)
class Branch:
    """A cut to try.

    Attributes:
        name: for people.
        slug: for folders.
        cut: options of `secateur structure`.
    """

    name: str
    slug: str
    cut: Mapping[str, float] = field(default_factory=dict)


BRANCHES = (
    Branch("10% of the layers cut", "layers-0.9", {"keep_layers": 0.9}),
    Branch("20% of the layers cut", "layers-0.8", {"keep_layers": 0.8}),
    Branch("25% of the FFN neurons cut", "ffn-0.75", {"ffn": 0.75}),
)
"""The cuts to try, in this order."""


def branched(
    ground: Ground,
    names: Sequence[str],
    menu: Menu,
    best: Finalist,
    costs: Costs,
    measure: Yardstick,
) -> tuple[list[Finalist], list[FitBranch]]:
    """Cut the model in several ways, and make what may beat the best model without a cut.

    Args:
        ground: of the fit.
        names: of the linears of the uncut model.
        menu: of the uncut model, with finer sparsities (`finer`).
        best: the best model without a cut.
        costs: the bounds.
        measure: measures on the windows that choose.

    Returns:
        The models that were made and keep the budget, and what became of every branch.
    """
    found: list[Finalist] = []
    told: list[FitBranch] = []
    if best.told.divergence <= WORTH:
        return found, told
    plans: list[CutPlan] = []
    inherited = dict(zip(names, zip(menu.cost, menu.rise, strict=True), strict=True))
    for branch in BRANCHES:
        cut = cut_model(ground, branch, plans)
        if isinstance(cut, str):
            told.append(FitBranch(branch.name, None, None, cut))
            continue
        leader = min([best, *found], key=lambda one: one.told.divergence).told.divergence
        alone = measure.divergence(cut)
        finalist, outcome = None, f"worse alone than the {leader:.3f} of the best"
        if alone < leader:
            finalist, outcome = grown(ground, inherited, branch, cut, alone, leader, costs, measure)
        if finalist is not None:
            found.append(finalist)
        told.append(FitBranch(branch.name, packed_bytes(ground, cut), alone, outcome))
    return found, told


def structure_options(recipe: FitRecipe, branch: Branch, text: str) -> dict[str, Any]:
    """The options of `structure` that make a branch."""
    return {
        "effort": recipe.effort,
        **branch.cut,
        "calibration": {"source": text},
        **shared(recipe),
    }


def cut_model(ground: Ground, branch: Branch, plans: list[CutPlan]) -> Path | str:
    """Make the model of a branch, unless an earlier run has; or say why it is not made.

    Args:
        ground: of the fit.
        branch: the cut.
        plans: what earlier branches cut; this one is added.
    """
    recipe = ground.recipe
    output = ground.work / "branches" / branch.slug / "cut"
    output.parent.mkdir(parents=True, exist_ok=True)
    options = structure_options(recipe, branch, str(ground.fitted))
    ends = {"model": str(ground.reader.folder), "output": str(output), **trust(recipe)}
    try:
        run = build_recipe(StructureRecipe, {**options, **ends})
        plan = aim_of(run, ground.target.model)
        if plan in plans:
            return "the same cut as another one: the model is small"
        plans.append(plan)
        if not output.exists():
            structure_recipe(run, Labelled(ground.progress, branch.name), resume=True)
    except (RecipeError, ArchitectureError) as error:
        return f"cannot be cut: {error.what}"
    return output


def grown(
    ground: Ground,
    inherited: Inherited,
    branch: Branch,
    cut: Path,
    alone: float,
    leader: float,
    costs: Costs,
    measure: Yardstick,
) -> tuple[Finalist | None, str]:
    """The best expected candidate of a branch, made if it may win; and what became of it.

    Args:
        ground: of the fit.
        inherited: costs and rises of the linears of the uncut model.
        branch: the cut.
        cut: the model of the branch.
        alone: its divergence.
        leader: the divergence to beat.
        costs: the bounds.
        measure: measures on the windows that choose.
    """
    reader = CheckpointReader(cut)
    matrices = find_matrices(reader, "int8", ground.recipe.trust_remote_code)
    try:
        own = costs.of_another(costs_of(ground.recipe, reader, matrices, ground.progress))
    except ArchitectureError as error:
        return None, error.what
    menu, names = inherited_menu(ground, inherited, reader, matrices, own)
    candidate = menu.best(own.aim)
    if candidate is None:
        return None, "no level fits"
    expected = alone + menu.predicted(candidate)
    if expected >= leader:
        return None, f"expected {expected:.3f}, and the best has {leader:.3f}"
    kinds = {name: own.every[level] for name, level in zip(names, candidate, strict=True)}
    sparse, folder = made(
        ground.recipe, cut, matrices, kinds, ground.fitted, cut.parent / "mix",
        Labelled(ground.progress, branch.name),
    )  # fmt: skip
    sizes = linear_bytes(CheckpointReader(folder), matrices, kinds)
    size, most = own.file_bytes(kinds, sizes), own.kinds[0].limit
    if size > most:
        return None, f"made, and {size - most:,.0f} bytes too large"
    packed, divergence = measure.packed(sparse, folder, kinds)
    told = FitFinalist(branch.name, size, expected, None, divergence)
    options = structure_options(ground.recipe, branch, str(ground.fitted))
    step = {"structure": options}
    return Finalist(cut, sparse, folder, packed, kinds, told, step), f"made: {divergence:.3f}"


def inherited_menu(
    ground: Ground,
    inherited: Inherited,
    reader: CheckpointReader,
    matrices: Mapping[str, PackableMatrix],
    costs: Costs,
) -> tuple[Menu, list[str]]:
    """The menu of a branch, taken over from the uncut model; and the names of its linears."""
    cost, rise, names = [], [], []
    for uncut, stored, linear in origins(ground, reader, matrices):
        home, (known, rises) = ground.stored[uncut], inherited[uncut]
        before = as_seen(ground.reader, home, ground.matrices[home])
        now = as_seen(reader, stored, matrices[stored])
        of_weights = prod(now) / prod(before)
        sizes = [
            cost_before[0] * size_of(now, kind) / size_of(before, kind)
            for cost_before, kind in zip(known, costs.every, strict=True)
        ]
        kinds = zip(costs.every, sizes, strict=True)
        cost.append(tuple(costs.of(linear, kind, size) for kind, size in kinds))
        rise.append(tuple(of_weights * one for one in rises))
        names.append(linear)
    return Menu(tuple(cost), tuple(rise)), names


def origins(
    ground: Ground, reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]
) -> list[tuple[str, str, str]]:
    """Of every linear of a branch: its name in the uncut model, its stored name and its name."""
    trusted = ground.recipe.trust_remote_code
    target = CheckpointTarget(reader, None, ground.target.device, trust_remote_code=trusted)
    steps = json.loads((reader.folder / NOTES / STEPS).read_text(encoding="utf-8"))
    kept = list(range(len(ground.target.layers)))
    for step in steps:
        kept = [kept[n] for n in (step.get("cut") or {}).get("layers", range(len(kept)))]
    layer_name, before = target.architecture.layer_name, ground.target.architecture.layer_name
    found = []
    for number, uncut in enumerate(kept):
        prefix = layer_name(number) + "."
        for stored, matrix in matrices.items():
            if matrix.linear.startswith(prefix):
                own = matrix.linear.removeprefix(prefix)
                found.append((f"{before(uncut)}.{own}", stored, matrix.linear))
    return found


def packed_bytes(ground: Ground, folder: Path) -> int:
    """Bytes of a model whose linears are bfloat16 and whose embeddings are int8."""
    reader = CheckpointReader(folder)
    matrices = find_matrices(reader, "int8", ground.recipe.trust_remote_code)
    linears = sum(2 * prod(reader.entries[n].shape) for n, one in matrices.items() if one.prunable)
    return other_bytes(reader, matrices) + linears
