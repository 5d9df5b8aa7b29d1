"""The candidates of a fit, made as real models, packed, and measured as they run.

What every unit costs and is predicted to lose is known (`survey`). For a budget the knapsack
chooses two models: the best of all formats without zeros, and the best of all formats. Both are
made.

A candidate can also have a cut structure: fewer layers, neurons, KV groups or experts. `secateur
structure` cuts it with the preset of the fit, which also refits or teaches what is left. It takes
over the survey of the uncut model: a linear keeps its rise, times its share of weights. So its best
mix for the budget is known at once:

    expected = divergence of the cut model alone + rises of its linears

It is made only if that is less than what the best model without a cut has.

The best candidates learn from the dense model on their own grids and masks (`healed`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

from secateur.engine.search.knapsack import Knapsack
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import ArchitectureError, RecipeError
from secateur.progress import Labelled
from secateur.recipes.prune import ChainRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.recipes.structure import StructureRecipe
from secateur.reporting.fit import MIXED, FitBranch, FitFinalist
from secateur.reporting.models import CompressResult
from secateur.runs.folder import NOTES, STATE
from secateur.runs.output import write_text
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.checkpoint_files import STEPS
from secateur.steps.fitting.costs import Costs, costs_of
from secateur.steps.fitting.models import (
    FitContext,
    Formats,
    ModelEvaluator,
    chain_steps,
    heal_model,
    make_model,
    paths,
    shared_options,
)
from secateur.steps.fitting.storage_formats import PACKED_FOLDER
from secateur.steps.fitting.survey import Predictions
from secateur.steps.runner import RunContext, carry_out, step_of
from secateur.structured.cut_plan import CutPlan, plan_cut

RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"

ROUNDED = "rounded"

WORTH = 0.1
"""Nats per token. Where the best model without a cut is this near, no cut is tried. On SmolLM2, any
cut of a tenth of the decoder costs at least 0.2 (docs/structure/README.md)."""

TRIES = 2
"""How often a mix is chosen, if the first one becomes larger than predicted."""

LESS = 0.95
"""A second mix is made only if it is predicted to lose less than so much of what the first lost:
predictions err by more than a smaller gain."""

NEAR = 1.1
"""The best candidate is healed, and those that lose at most so many times as much before."""

HEALABLE = 1.3
"""With a bound on the loss, smaller candidates that exceed it by at most so much are healed too."""


@dataclass(frozen=True)
class BuiltCandidate:
    """A model that was made.

    Attributes:
        base: the model before pruning: the source, or a cut of it.
        sparse: the model before rounding.
        packed: the model, packed: what is measured.
        formats: how every unit is stored.
        row: its numbers, for the result.
        cut: the step of a chain that makes `base`; empty if nothing was cut.
    """

    base: Path
    sparse: Path
    packed: Path
    formats: Formats
    row: FitFinalist
    cut: Mapping[str, Any] = field(default_factory=dict)

    @property
    def divergence(self) -> float:
        """From the dense model, in nats per token; after healing, if it was healed."""
        return self.row.divergence if self.row.healed is None else self.row.healed

    @property
    def rise(self) -> float:
        """Of the loss, cautiously, where the recipe bounds it."""
        assert self.row.rise is not None
        return self.row.rise

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
    StructuredCandidate("25% of the FFN neurons cut", "ffn-0.75", {"ffn": 0.75}),
    StructuredCandidate("25% of the experts cut", "experts-0.75", {"experts": 0.75}),
)
"""The cuts to try, in this order."""


@dataclass(frozen=True)
class Workshop:
    """What makes candidates and measures them.

    Attributes:
        context: of the fit.
        predictions: what every unit is predicted to lose.
        evaluator: measures whole models on the windows that choose.
    """

    context: FitContext
    predictions: Predictions
    evaluator: ModelEvaluator

    def made(
        self, name: str, base: Path, formats: Formats, predicted: float, cut: Mapping[str, Any]
    ) -> BuiltCandidate:
        """Make a candidate, unless an earlier run has, and measure it.

        Args:
            name: for people.
            base: the source, or a cut of it.
            formats: of every unit.
            predicted: its divergence.
            cut: the step of a chain that makes the base.
        """
        context = self.context
        label = Labelled(context.progress, f"a model, {name}")
        with context.time.phase("making"):
            sparse, packed = make_model(context, base, formats, self._place(base, formats), label)
            divergence = self.evaluator.packed(packed)
        size = context.costs.files.finish(packed, context.progress)
        rise = self.evaluator.rise(packed)
        row = FitFinalist(name, size, predicted, divergence, rise=rise)
        return BuiltCandidate(base, sparse, packed, formats, row, cut)

    def healed(self, candidate: BuiltCandidate) -> BuiltCandidate:
        """A candidate after it has learned from the dense model.

        One that is worse then, or too large, because fewer weights round to zero, stays as it was.
        """
        context, formats = self.context, candidate.formats
        label = Labelled(context.progress, f"healing the model, {candidate.row.name}")
        place = self._place(candidate.base, formats)
        with context.time.phase("healing"):
            packed = heal_model(context, candidate.sparse, formats, place, label)
            divergence = self.evaluator.packed(packed)
        size = context.costs.files.finish(packed, context.progress)
        if divergence >= candidate.row.divergence or size > context.costs.kinds[0].limit:
            return candidate
        rise = self.evaluator.rise(packed)
        row = replace(candidate.row, file_bytes=size, healed=divergence, rise=rise)
        return replace(candidate, packed=packed, row=row)

    def _place(self, base: Path, formats: Formats) -> Path:
        """The folder of a model, by its formats; that of a cut is beside the cut."""
        lines = "\n".join(f"{linear} {stored.name}" for linear, stored in sorted(formats.items()))
        folder = f"{crc32(lines.encode()):08x}"
        if base == self.context.source.folder:
            return self.context.work / "mixes" / folder
        return base.parent / folder


def _rounded(knapsack: Knapsack, costs: Costs) -> Candidate | None:
    """The best formats without zeros."""
    bare = [n for n, stored in enumerate(costs.formats) if not stored.sparsity]
    return knapsack.best(costs.aim, bare)


def _mixed(knapsack: Knapsack, costs: Costs) -> Candidate | None:
    """The best of all formats."""
    return knapsack.best(costs.aim)


CHOICES = {ROUNDED: _rounded, MIXED: _mixed}
"""How the models are chosen."""


def build_mixes(
    workshop: Workshop, costs: Costs
) -> tuple[list[BuiltCandidate], list[FitBranch], Workshop]:
    """Make and measure the best mixes within a budget.

    Returns:
        The candidates within it, the mixes that were not made because they promise too little,
        and the workshop with predictions scaled by what was made.
    """
    found, unmade, seen = list[BuiltCandidate](), list[FitBranch](), set[Candidate]()
    most = costs.kinds[0].limit
    for name, choose in CHOICES.items():
        limit = most
        for _ in range(TRIES):
            own = costs.limited(0, limit)
            knapsack = workshop.predictions.knapsack(own)
            candidate = choose(knapsack, own)
            if candidate is None or candidate in seen:
                break
            seen.add(candidate)
            time = workshop.context.time
            predicted, first = knapsack.predicted(candidate), found[0].divergence if found else 0.0
            if found and predicted > LESS * first:
                outcome = (
                    f"not made, because {predicted:.3g} is predicted and {first:.3g} is reached"
                )
                unmade.append(FitBranch(name, None, None, outcome))
                break
            if found and not time.allows(name, time.expected("making")):
                break
            made, workshop = made_mix(workshop, name, knapsack, candidate, own)
            if made.row.file_bytes <= most:
                found.append(made)
                break
            limit -= made.row.file_bytes - most
    return found, unmade, workshop


def made_mix(
    workshop: Workshop, name: str, knapsack: Knapsack, candidate: Candidate, costs: Costs
) -> tuple[BuiltCandidate, Workshop]:
    """A mix of the whole model, and the workshop with predictions scaled by what it lost."""
    formats = {n: costs.formats[x] for n, x in zip(costs.units, candidate, strict=True)}
    predicted = knapsack.predicted(candidate)
    made = workshop.made(name, workshop.context.source.folder, formats, predicted, {})
    if predicted > 0 and made.divergence > 0:
        scaled = workshop.predictions.scaled(made.divergence, predicted)
        workshop = replace(workshop, predictions=scaled)
    return made, workshop


def best_of(candidates: Sequence[BuiltCandidate], bound: float | None = None) -> BuiltCandidate:
    """The candidate that diverges least from the dense model.

    Args:
        candidates: that were made.
        bound: on the rise of the loss. With one it is the smallest candidate within the bound, or
            the one whose loss rises least where none is.
    """
    if bound is None:
        return min(candidates, key=lambda one: one.divergence)
    within = [one for one in candidates if one.rise <= bound]
    smallest = min(within, key=lambda one: one.row.file_bytes, default=None)
    return smallest or min(candidates, key=lambda one: one.rise)


def heal_candidates(
    workshop: Workshop, candidates: Sequence[BuiltCandidate]
) -> list[BuiltCandidate]:
    """Heal the candidates that may win; the others stay as they are."""
    context, found = workshop.context, []
    bound = context.recipe.max_loss_increase
    best = best_of(candidates, bound)

    def may_win(one: BuiltCandidate) -> bool:
        if bound is None:
            return one.divergence <= NEAR * best.divergence
        smaller = one.row.file_bytes < best.row.file_bytes
        return one is best or (smaller and one.rise <= HEALABLE * bound)

    for one in sorted(candidates, key=lambda one: one.divergence):
        heals = context.recipe.tokens_to_heal and may_win(one)
        if heals and context.time.allows("healing", context.time.expected("healing")):
            one = workshop.healed(one)
        found.append(one)
    return found


def pack_winner(run: RunContext, context: FitContext, winner: BuiltCandidate) -> CompressResult:
    """Put the packed winner into the folder of the run, with the recipe that makes it again."""
    recipe, folder = context.recipe, run.folder
    text = f"{recipe.output}/{NOTES}/{WINDOWS}"
    teacher = None if winner.row.healed is None else recipe.model
    steps = chain_steps(recipe, winner.formats, text, teacher)
    if winner.cut:
        [[verb, given]] = winner.cut.items()
        steps.insert(0, {verb: {**given, "calibration": {"source": text}}})
    shutil.copytree(winner.packed, folder.fresh_model(), dirs_exist_ok=True)
    (folder.notes / STATE).unlink(missing_ok=True)
    shutil.copyfile(context.calibration_file, folder.notes / WINDOWS)
    if winner.cut:
        steps_of_cut = folder.notes / "steps" / "structure"
        shutil.copytree(winner.base / NOTES, steps_of_cut, dirs_exist_ok=True)
    chain = {
        "model": recipe.model,
        "output": f"{recipe.output}-again",
        "steps": steps,
        "trust_remote_code": recipe.trust_remote_code,
    }
    write_text(folder.notes / RECIPE, dump_recipe(build_recipe(ChainRecipe, chain)))
    # the card and the notes name places of the result, and none among the work of the run
    places = {str(context.calibration_file): text, str(winner.packed): str(recipe.output)}
    places |= {str(one): str(recipe.output) for one in (winner.sparse, winner.base)
               if one != context.source.folder}  # fmt: skip
    if not Path(recipe.model).exists():  # a hub id or a sample, which others can read too
        places[str(context.source.folder)] = recipe.model
    notes = [file for file in folder.notes.rglob("*") if file.suffix in (".json", ".yaml")]
    for file in (folder.model / "README.md", *notes):
        content = file.read_text(encoding="utf-8")
        for work, result in places.items():
            content = content.replace(work, result)
        write_text(file, content)
    packed: CompressResult = step_of("compress").result(folder.model)
    return packed.model_copy(update={"output": folder.output})


def build_structured(
    workshop: Workshop, best: BuiltCandidate, costs: Costs
) -> tuple[list[BuiltCandidate], list[FitBranch]]:
    """Cut the model in several ways, and make what may beat the best model without a cut.

    Args:
        workshop: makes and measures.
        best: the best model without a cut.
        costs: the bounds.

    Returns:
        The models that were made and keep the budget, and what became of every cut.
    """
    found: list[BuiltCandidate] = []
    rows: list[FitBranch] = []
    if best.divergence <= WORTH:
        return found, rows
    context, plans = workshop.context, list[CutPlan]()
    for structured in STRUCTURED_CANDIDATES:
        if "experts" in structured.cut and not context.has_experts:
            continue
        cut = _cut_model(context, structured, plans)
        if isinstance(cut, str):
            rows.append(FitBranch(structured.name, None, None, cut))
            continue
        model = PackableCheckpoint.open(cut, trust_remote_code=context.recipe.trust_remote_code)
        leader = min(one.divergence for one in [best, *found])
        alone = workshop.evaluator.divergence(cut)
        outcome = f"worse alone than the {leader:.3f} of the best"
        if alone < leader:
            built = _build_on_cut(workshop, structured, model, alone, leader, costs)
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
    workshop: Workshop,
    structured: StructuredCandidate,
    cut: PackableCheckpoint,
    alone: float,
    leader: float,
    costs: Costs,
) -> BuiltCandidate | str:
    """The best expected mix of a cut model, made if it may win; or why there is none."""
    context = workshop.context
    try:
        own = costs.of_another(costs_of(context.recipe, cut, context.progress))
    except ArchitectureError as error:
        return error.what
    uncut = context.model.shapes
    share_of = {
        linear: (home, prod(cut.shapes[linear]) / prod(uncut[home]))
        for linear, home in _origins(context, cut)
    }
    knapsack = workshop.predictions.knapsack(own, share_of)
    candidate = knapsack.best(own.aim)
    if candidate is None:
        return "no format fits"
    expected = alone + knapsack.predicted(candidate)
    if expected >= leader:
        return f"expected {expected:.3f}, and the best has {leader:.3f}"
    formats = {name: own.formats[x] for name, x in zip(own.units, candidate, strict=True)}
    step = {"structure": _structure_options(context, structured)}
    made = workshop.made(structured.name, cut.reader.folder, formats, expected, step)
    size, most = made.row.file_bytes, own.kinds[0].limit
    return made if size <= most else f"made, and {size - most:,.0f} bytes too large"


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
