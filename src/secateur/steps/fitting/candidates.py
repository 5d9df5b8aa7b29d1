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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, prod
from pathlib import Path
from typing import Any
from zlib import crc32

from secateur.engine.search.knapsack import Cost, Knapsack, fits
from secateur.engine.search.stored_levels import FitSearch, Point
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError, RecipeError
from secateur.progress import Labelled
from secateur.recipes.reading import build_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.fit import FitBranch, FitFinalist
from secateur.runs.folder import NOTES
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.checkpoint_files import STEPS
from secateur.steps.fitting.context import ExpectedSeconds, FitContext
from secateur.steps.fitting.costs import Costs, costs_of
from secateur.steps.fitting.models import (
    Formats,
    ModelEvaluator,
    bytes_of_linears,
    make_model,
    paths,
    shared_options,
)
from secateur.steps.fitting.storage_formats import (
    LEVELS,
    PACKED_FOLDER,
    StorageFormat,
    size_of,
)
from secateur.steps.runner import carry_out, step_of
from secateur.structured.cut_plan import CutPlan, plan_cut

SEARCHED = "the search's choice"
SURVEYED = "the survey's choice"
QUANTIZED = "only rounded, mixed"
SINGLE = "the best single technique"

LEAST_RISE = 1e-12

HALF, MOST = (LEVELS.index(StorageFormat("bfloat16", s)) for s in (0.5, 0.7))

WORTH = 0.1
"""Nats per token. Where the best model without a cut is this near, no cut is tried. On SmolLM2, any
cut of a tenth of the decoder costs at least 0.2 (docs/structure/README.md)."""


@dataclass(frozen=True)
class BuiltCandidate:
    """A model that was made whole.

    Attributes:
        base: the model before pruning: the source, or a cut of it.
        sparse: the model before rounding.
        folder: the model, pruned and rounded.
        packed: the same, packed: what is measured.
        formats: how every linear is stored.
        row: its numbers, for the result.
        cut: the step of a chain that makes `base`; empty if nothing was cut.
    """

    base: Path
    sparse: Path
    folder: Path
    packed: Path
    formats: Formats
    row: FitFinalist
    cut: Mapping[str, Any] = field(default_factory=dict)

    @property
    def divergence(self) -> float:
        """From the dense model, in nats per token."""
        return self.row.divergence

    @property
    def only_rounded(self) -> bool:
        """Whether it has no zeros and no cut."""
        return not self.cut and not any(stored.sparsity for stored in self.formats.values())


@dataclass(frozen=True)
class StructuredCandidate:
    """A cut to try.

    Attributes:
        name: for people.
        slug: for folders.
        cut: options of `secateur structure`.
    """

    name: str
    slug: str
    cut: Mapping[str, float]


STRUCTURED_CANDIDATES = (
    StructuredCandidate("10% of the layers cut", "layers-0.9", {"keep_layers": 0.9}),
    StructuredCandidate("20% of the layers cut", "layers-0.8", {"keep_layers": 0.8}),
    StructuredCandidate("25% of the FFN neurons cut", "ffn-0.75", {"ffn": 0.75}),
)
"""The cuts to try, in this order."""


@dataclass(frozen=True)
class MeasuredLevels:
    """The levels, measured: by this, candidates are chosen.

    Attributes:
        context: of the fit.
        expected: seconds of further phases.
        search: the search. Without a survey of the layers, only single levels take part.
        knapsack: the levels of every linear, and after them the finer formats.
        singles: every level alone.
        frontier: further measured candidates; may be empty.
        evaluator: measures whole models on the windows that choose.
    """

    context: FitContext
    expected: ExpectedSeconds
    search: FitSearch
    knapsack: Knapsack
    singles: Sequence[Point]
    frontier: Sequence[Point]
    evaluator: ModelEvaluator


def best_single(measured: MeasuredLevels, budget: Cost) -> BuiltCandidate | None:
    """The best single level within a budget of the linears; it is made already."""
    fitting = [point for point in measured.singles if fits(point.cost, budget)]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    if best is None:
        return None
    context, (number, *_) = measured.context, best.candidate
    levels = context.costs.levels
    bare = levels.index(StorageFormat("bfloat16", levels[number].sparsity))
    folders = [one.reader.folder for one in measured.search.levels]
    formats = dict.fromkeys(measured.search.names, levels[number])
    packed, divergence = measured.evaluator.packed(folders[bare], folders[number], formats)
    size = round(context.costs.rest[0] + best.cost[0])
    row = FitFinalist(SINGLE, size, best.predicted, best.divergence, divergence)
    dense = context.source.folder
    return BuiltCandidate(dense, folders[bare], folders[number], packed, formats, row)


def build_mixes(
    measured: MeasuredLevels, searched: Candidate, budget: Cost
) -> list[BuiltCandidate]:
    """Make and measure the best mixes: prune, then round, each linear in its own format.

    Args:
        measured: the levels.
        searched: what the search found.
        budget: of the search.
    """
    context, search, expected = measured.context, measured.search, measured.expected
    mixes = {
        SEARCHED: searched,
        QUANTIZED: search.knapsack.best(budget, search.allowed("quantize")),
        SURVEYED: measured.knapsack.best(budget),
    }
    every, dense, found = context.costs.every, context.source.folder, list[BuiltCandidate]()
    seen = set[Candidate]()
    for name, candidate in mixes.items():
        if candidate is None or len(set(candidate)) == 1 or candidate in seen:
            continue
        seen.add(candidate)
        if not context.time.allows(f"making {name}", expected.rest):
            continue
        formats = {n: every[level] for n, level in zip(search.names, candidate, strict=True)}
        lines = "\n".join(f"{linear} {stored.name}" for linear, stored in sorted(formats.items()))
        output = context.work / "mixes" / f"{crc32(lines.encode()):08x}"
        label = Labelled(context.progress, f"making {name}")
        sparse, model = make_model(context, context.model, formats, output, label)
        folder = model.reader.folder
        packed, divergence = measured.evaluator.packed(sparse, folder, formats)
        row = FitFinalist(
            name=name,
            file_bytes=context.costs.file_bytes(formats, bytes_of_linears(model, formats)),
            predicted=measured.knapsack.predicted(candidate),
            mixed=search.measured(candidate)[0] if max(candidate) < len(search.levels) else None,
            divergence=divergence,
        )
        found.append(BuiltCandidate(dense, sparse, folder, packed, formats, row))
    return found


def finer_knapsack(costs: Costs, search: FitSearch) -> Knapsack:
    """The knapsack of the levels and, after them, of the finer formats that the target stores."""
    cost, rise, finer = [], [], costs.files.finer
    known = zip(search.names, search.knapsack.cost, search.knapsack.rise, strict=True)
    for name, own, rises in known:
        bytes_of = tuple(level[0] for level in own)
        sizes = [finer_bytes(stored, costs.shapes[name], bytes_of) for stored in finer]
        more = [costs.of(name, stored, x) for stored, x in zip(finer, sizes, strict=True)]
        cost.append((*own, *more))
        rise.append((*rises, *(finer_rise(stored, rises) for stored in finer)))
    return Knapsack(tuple(cost), tuple(rise))


def finer_bytes(
    stored: StorageFormat, shape: tuple[int, int], bytes_of: tuple[float, ...]
) -> float:
    """Bytes of a linear: those of its level with 50 % zeros, and the difference by arithmetic."""
    near = StorageFormat(stored.values, 0.5)
    return bytes_of[LEVELS.index(near)] + size_of(shape, stored) - size_of(shape, near)


def finer_rise(stored: StorageFormat, rises: tuple[float, ...]) -> float:
    """What a linear adds to the divergence, in nats."""
    half, most = (log(max(rises[n], LEAST_RISE)) for n in (HALF, MOST))
    pruning = exp(half + (most - half) * (stored.sparsity - 0.5) / 0.2)
    bare = rises[LEVELS.index(StorageFormat(stored.values, 0.0))]
    sparse = max(rises[LEVELS.index(StorageFormat(stored.values, 0.5))] - rises[HALF], 0.0)
    return pruning + bare + (sparse - bare) * min(stored.sparsity / 0.5, 1.0)


def build_structured(
    measured: MeasuredLevels, best: BuiltCandidate, costs: Costs
) -> tuple[list[BuiltCandidate], list[FitBranch]]:
    """Cut the model in several ways, and make what may beat the best model without a cut.

    Args:
        measured: the levels of the uncut model.
        best: the best model without a cut.
        costs: the bounds.

    Returns:
        The models that were made and keep the budget, and what became of every cut.
    """
    found: list[BuiltCandidate] = []
    rows: list[FitBranch] = []
    if best.divergence <= WORTH:
        return found, rows
    context, plans = measured.context, list[CutPlan]()
    for structured in STRUCTURED_CANDIDATES:
        cut = _cut_model(context, structured, plans)
        if isinstance(cut, str):
            rows.append(FitBranch(structured.name, None, None, cut))
            continue
        model = PackableCheckpoint.open(cut, trust_remote_code=context.recipe.trust_remote_code)
        leader = min(one.divergence for one in [best, *found])
        alone = measured.evaluator.divergence(cut)
        outcome = f"worse alone than the {leader:.3f} of the best"
        if alone < leader:
            built = _build_on_cut(measured, structured, model, alone, leader, costs)
            if isinstance(built, str):
                outcome = built
            else:
                found.append(built)
                outcome = f"made: {built.divergence:.3f}"
        size = PACKED_FOLDER.rest(model) + sum(2 * prod(shape) for shape in model.shapes.values())
        rows.append(FitBranch(structured.name, size, alone, outcome))
    return found, rows


def _structure_options(context: FitContext, structured: StructuredCandidate) -> dict[str, Any]:
    """The options of `structure` that make a cut."""
    return {
        "effort": context.recipe.effort,
        **structured.cut,
        "calibration": {"source": str(context.calibration_file)},
        **shared_options(context.recipe),
    }


def _cut_model(
    context: FitContext, structured: StructuredCandidate, plans: list[CutPlan]
) -> Path | str:
    """Cut the model, unless an earlier run has; or say why it is not cut."""
    output = context.work / "branches" / structured.slug / "cut"
    output.parent.mkdir(parents=True, exist_ok=True)
    options = _structure_options(context, structured)
    own = paths(context.recipe, context.source.folder, output)
    try:
        recipe = build_recipe(StructureRecipe, {**options, **own})
        plan = plan_cut(recipe, context.target.model)
        if plan in plans:
            return "the same cut as another one: the model is small"
        plans.append(plan)
        if not output.exists():
            progress = Labelled(context.progress, structured.name)
            carry_out(step_of("structure"), recipe, progress, resume=True)
    except (RecipeError, ArchitectureError) as error:
        return f"cannot be cut: {error.what}"
    return output


def _build_on_cut(
    measured: MeasuredLevels,
    structured: StructuredCandidate,
    cut: PackableCheckpoint,
    alone: float,
    leader: float,
    costs: Costs,
) -> BuiltCandidate | str:
    """The best expected mix of a cut model, made if it may win; or why there is none."""
    context, base = measured.context, cut.reader.folder
    try:
        own = costs.of_another(costs_of(context.recipe, cut, context.progress))
    except ArchitectureError as error:
        return error.what
    knapsack, names = _inherited_knapsack(measured, cut, own)
    candidate = knapsack.best(own.aim)
    if candidate is None:
        return "no level fits"
    expected = alone + knapsack.predicted(candidate)
    if expected >= leader:
        return f"expected {expected:.3f}, and the best has {leader:.3f}"
    formats = {name: own.every[level] for name, level in zip(names, candidate, strict=True)}
    label = Labelled(context.progress, structured.name)
    sparse, model = make_model(context, cut, formats, base.parent / "mix", label)
    size, most = own.file_bytes(formats, bytes_of_linears(model, formats)), own.kinds[0].limit
    if size > most:
        return f"made, and {size - most:,.0f} bytes too large"
    folder = model.reader.folder
    packed, divergence = measured.evaluator.packed(sparse, folder, formats)
    row = FitFinalist(structured.name, size, expected, None, divergence)
    step = {"structure": _structure_options(context, structured)}
    return BuiltCandidate(base, sparse, folder, packed, formats, row, step)


def _inherited_knapsack(
    measured: MeasuredLevels, cut: PackableCheckpoint, costs: Costs
) -> tuple[Knapsack, list[str]]:
    """The knapsack of a cut model, taken over from the uncut one; and the names of its linears."""
    place_of = {name: place for place, name in enumerate(measured.search.names)}
    uncut, known = measured.context.model.shapes, measured.knapsack
    cost, rise, names = [], [], []
    for linear, home in _origins(measured.context, cut):
        before, now, place = uncut[home], cut.shapes[linear], place_of[home]
        sizes = [
            level[0] * size_of(now, one) / size_of(before, one)
            for level, one in zip(known.cost[place], costs.every, strict=True)
        ]
        pairs = zip(costs.every, sizes, strict=True)
        cost.append(tuple(costs.of(linear, one, size) for one, size in pairs))
        of_weights = prod(now) / prod(before)
        rise.append(tuple(of_weights * one for one in known.rise[place]))
        names.append(linear)
    return Knapsack(tuple(cost), tuple(rise)), names


def _origins(context: FitContext, cut: PackableCheckpoint) -> Iterator[tuple[str, str]]:
    """Every linear of a cut model, and its name in the uncut one."""
    uncut, trust = context.target, context.recipe.trust_remote_code
    target = CheckpointTarget(cut.reader, None, uncut.device, trust_remote_code=trust)
    steps = json.loads((cut.reader.folder / NOTES / STEPS).read_text(encoding="utf-8"))
    kept = list(range(len(uncut.layers)))
    for step in steps:
        kept = [kept[n] for n in (step.get("cut") or {}).get("layers", range(len(kept)))]
    for number, before in enumerate(kept):
        prefix = target.architecture.layer_name(number) + "."
        home = uncut.architecture.layer_name(before) + "."
        for linear in cut.linears:
            if linear.startswith(prefix):
                yield linear, home + linear.removeprefix(prefix)
