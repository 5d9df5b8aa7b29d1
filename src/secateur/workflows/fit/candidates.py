"""The candidates of a fit, made as real models, packed, and measured as they run.

A mix that is made can give a linear any sparsity, also one between those of the levels. What it
costs is arithmetic, and what it loses lies between two levels that were measured:

    pruning(s)     = exp(line through ln rise at 50 % and at 70 %, bfloat16)
    rounding(v, s) = line through the rise of rounding at 0 % and at 50 %; constant above
    rise(v, s)     = pruning(s) + rounding(v, s)

A candidate can also have a cut structure: fewer layers or neurons. `secateur structure` cuts it
with the preset of the fit, which also refits or teaches what is left. It takes over the survey of
the uncut model: a linear keeps its rise, times its share of weights. So a cut model needs no levels
of its own, and its best mix for the budget is known at once:

    expected = divergence of the cut model alone + rises of its linears

It is made only if that is less than what the best model without a cut has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, prod
from pathlib import Path
from typing import Any
from zlib import crc32

from secateur.engine.choose.knapsack import Cost, Knapsack, fits
from secateur.engine.choose.stored_levels import FitSearch, Point
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.recipes.fit import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.results.fit import FitBranch, FitFinalist
from secateur.runs.folder import NOTES
from secateur.sparsity.evolution import Candidate
from secateur.workflows.compress.storage_plan import PackableMatrix, find_matrices
from secateur.workflows.fit.build_models import Kinds, linear_bytes, made, shared, trust
from secateur.workflows.fit.context import Ground
from secateur.workflows.fit.costs import Costs, costs_of
from secateur.workflows.fit.evaluation import Yardstick
from secateur.workflows.fit.storage_formats import KINDS, LevelKind, as_seen, other_bytes, size_of
from secateur.workflows.structure.cut_plan import CutPlan, plan_cut
from secateur.workflows.structure.run import STEPS, structure_recipe

SEARCHED = "the search's choice"


SURVEYED = "the survey's choice"


QUANTIZED = "only rounded, mixed"


SINGLE = "the best single technique"


LEAST_RISE = 1e-12


HALF, MOST = (KINDS.index(LevelKind("bfloat16", s)) for s in (0.5, 0.7))


WORTH = 0.1
"""Nats per token. Where the best model without a cut is this near, no cut is tried. On SmolLM2, any
cut of a tenth of the decoder costs at least 0.2 (docs/structure/README.md)."""


Inherited = Mapping[str, tuple[tuple[Cost, ...], tuple[float, ...]]]
"""Costs and rises on every level of the linears of the uncut model, by name."""


@dataclass(frozen=True)
class Finalist:
    """A model that was made whole.

    Attributes:
        base: the model before pruning: the source, or a cut of it.
        sparse: the model before rounding.
        folder: the model, pruned and rounded.
        packed: the same, packed: what is measured.
        kinds: how every linear is stored.
        told: its numbers, for the result.
        cut: the step of a chain that makes `base`; empty if nothing was cut.
    """

    base: Path
    sparse: Path
    folder: Path
    packed: Path
    kinds: Kinds
    told: FitFinalist
    cut: Mapping[str, Any] = field(default_factory=dict)

    @property
    def only_rounded(self) -> bool:
        """Whether it has no zeros and no cut."""
        return not self.cut and not any(kind.sparsity for kind in self.kinds.values())


def mixes(
    search: FitSearch, knapsack: Knapsack, winner: Point, budget: Cost
) -> dict[str, Candidate]:
    """The mixes to make, by what chose them; no mix twice.

    Args:
        search: after the survey.
        knapsack: with finer sparsities (`finer`).
        winner: of the search.
        budget: of the search.
    """
    wanted = {
        SEARCHED: winner.candidate,
        QUANTIZED: search.knapsack.best(budget, search.allowed("quantize")),
        SURVEYED: knapsack.best(budget),
    }
    found: dict[str, Candidate] = {}
    for name, candidate in wanted.items():
        if candidate is not None and len(set(candidate)) > 1 and candidate not in found.values():
            found[name] = candidate
    return found


def finalists(
    ground: Ground,
    search: FitSearch,
    knapsack: Knapsack,
    chosen: Mapping[str, Candidate],
    measure: Yardstick,
    seconds: float,
) -> list[Finalist]:
    """Make and measure mixes: prune, then round, with the sparsity and the values of each linear.

    Args:
        ground: of the fit.
        search: after the survey.
        knapsack: with finer sparsities (`finer`).
        chosen: the mixes, by what chose them.
        measure: measures on the windows that choose.
        seconds: that one is expected to take, packed and judged.
    """
    found = []
    for name, candidate in chosen.items():
        if not ground.pace.allows(f"making {name}", seconds):
            continue
        every = ground.costs.every
        kinds = {n: every[level] for n, level in zip(search.names, candidate, strict=True)}
        sparse, folder = solved(ground, kinds, name)
        packed, divergence = measure.packed(sparse, folder, kinds)
        sizes = linear_bytes(CheckpointReader(folder), ground.matrices, kinds)
        told = FitFinalist(
            name=name,
            file_bytes=ground.costs.file_bytes(kinds, sizes),
            predicted=knapsack.predicted(candidate),
            mixed=search.measured(candidate) if max(candidate) < len(search.levels) else None,
            divergence=divergence,
        )
        found.append(Finalist(ground.reader.folder, sparse, folder, packed, kinds, told))
    return found


def single(
    ground: Ground, search: FitSearch, points: Sequence[Point], budget: Cost, measure: Yardstick
) -> Finalist | None:
    """The best single level within a budget of the linears; it is made already."""
    fitting = [point for point in points if fits(point.cost, budget)]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    if best is None:
        return None
    levels = ground.costs.levels
    kind = levels[best.candidate[0]]
    bare = levels.index(LevelKind("bfloat16", kind.sparsity))
    sparse, folder = (search.levels[n].level.reader.folder for n in (bare, best.candidate[0]))
    kinds = dict.fromkeys(search.names, kind)
    packed, divergence = measure.packed(sparse, folder, kinds)
    size = round(ground.costs.rest[0] + best.cost[0])
    told = FitFinalist(SINGLE, size, best.predicted, best.divergence, divergence)
    return Finalist(ground.reader.folder, sparse, folder, packed, kinds, told)


def solved(ground: Ground, kinds: Kinds, name: str) -> tuple[Path, Path]:
    """Make a mix, unless an earlier run has. Return its folders before and after rounding."""
    told = "\n".join(f"{linear} {kind.name}" for linear, kind in sorted(kinds.items()))
    output = ground.work / "mixes" / f"{crc32(told.encode()):08x}"
    progress = Labelled(ground.progress, f"making {name}")
    return made(
        ground.recipe,
        ground.reader.folder,
        ground.matrices,
        kinds,
        ground.fitted,
        output,
        progress,
    )


def finer_knapsack(ground: Ground, search: FitSearch) -> Knapsack:
    """The knapsack of the levels and, after them, of the finer kinds that the target stores.

    Args:
        ground: of the fit.
        search: after the survey.
    """
    cost, rise = [], []
    for place, name in enumerate(search.names):
        costs, rises = search.knapsack.cost[place], search.knapsack.rise[place]
        bytes_of = tuple(level[0] for level in costs)
        shape, finer = ground.costs.shapes[name], ground.costs.files.finer
        sizes = [finer_bytes(kind, shape, bytes_of) for kind in finer]
        more = [ground.costs.of(name, kind, x) for kind, x in zip(finer, sizes, strict=True)]
        cost.append((*costs, *more))
        rise.append((*rises, *(finer_rise(kind, rises) for kind in finer)))
    return Knapsack(tuple(cost), tuple(rise))


def finer_bytes(kind: LevelKind, shape: tuple[int, int], bytes_of: tuple[float, ...]) -> float:
    """Bytes of a linear: those of its level with 50 % zeros, and the difference by arithmetic."""
    near = LevelKind(kind.values, 0.5)
    return bytes_of[KINDS.index(near)] + size_of(shape, kind) - size_of(shape, near)


def finer_rise(kind: LevelKind, rises: tuple[float, ...]) -> float:
    """What a linear adds to the divergence, in nats."""
    half, most = (log(max(rises[n], LEAST_RISE)) for n in (HALF, MOST))
    pruning = exp(half + (most - half) * (kind.sparsity - 0.5) / 0.2)
    bare = rises[KINDS.index(LevelKind(kind.values, 0.0))]
    sparse = max(rises[KINDS.index(LevelKind(kind.values, 0.5))] - rises[HALF], 0.0)
    return pruning + bare + (sparse - bare) * min(kind.sparsity / 0.5, 1.0)


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
    knapsack: Knapsack,
    best: Finalist,
    costs: Costs,
    measure: Yardstick,
) -> tuple[list[Finalist], list[FitBranch]]:
    """Cut the model in several ways, and make what may beat the best model without a cut.

    Args:
        ground: of the fit.
        names: of the linears of the uncut model.
        knapsack: of the uncut model, with finer sparsities (`finer`).
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
    inherited = dict(zip(names, zip(knapsack.cost, knapsack.rise, strict=True), strict=True))
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
        plan = plan_cut(run, ground.target.model)
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
    knapsack, names = inherited_knapsack(ground, inherited, reader, matrices, own)
    candidate = knapsack.best(own.aim)
    if candidate is None:
        return None, "no level fits"
    expected = alone + knapsack.predicted(candidate)
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


def inherited_knapsack(
    ground: Ground,
    inherited: Inherited,
    reader: CheckpointReader,
    matrices: Mapping[str, PackableMatrix],
    costs: Costs,
) -> tuple[Knapsack, list[str]]:
    """The knapsack of a branch, taken over from the uncut model; and the names of its linears."""
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
    return Knapsack(tuple(cost), tuple(rise)), names


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
