"""`secateur fit`: a bound in, the best packed model within it out.

    survey ─► knapsack ─► candidates, made and measured ─► the best ones healed ─► judged

| target                   | what a fit does                                                   |
|--------------------------|-------------------------------------------------------------------|
| cpu                      | all formats: our kernels, timed on this machine                   |
| any                      | all formats, no bound on time or memory: these belong to an engine |
| llama.cpp                | what a GGUF file holds; bounds on size and loss                   |
| vllm, transformers, h100 | refused, with what does the work instead                          |

The choice is corrected where the winner decodes more slowly than the table of times predicts.
Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner and dense int8 are timed in turns. If the
winner misses the speed-up, models are chosen once more with a bound that is tighter by the same
factor:

    seconds' = seconds · measured speed-up / predicted speed-up

The new winner stays only if it is faster by more than the error of timing; it has lost more. What
was measured is kept, so a resumed run decides the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.calibration.documents import check_text
from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.errors import RecipeError, VerificationError
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.shared import texts_of
from secateur.reporting.charts import save_plots
from secateur.reporting.fit import (
    ONLY_ROUNDED,
    WINNER,
    FitBranch,
    FitCorrection,
    FitCost,
    FitLoss,
    FitPoint,
    FitResult,
)
from secateur.reporting.plan import FitPlanResult
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_json
from secateur.runs.records import read_record
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.fitting.bounds import (
    OPTION_OF,
    TIMING_ERROR,
    as_option,
    check_bounds,
    check_feasible,
    prepared_tasks,
    speedup_of,
)
from secateur.steps.fitting.candidates import (
    BuiltCandidate,
    Workshop,
    best_of,
    build_mixes,
    build_structured,
    heal_candidates,
    pack_winner,
)
from secateur.steps.fitting.costs import MARGINS, SIZE, Costs, costs_of
from secateur.steps.fitting.models import FitContext, ModelEvaluator, TimeBudget
from secateur.steps.fitting.storage_formats import EMBEDDINGS, FILES, embedded
from secateur.steps.fitting.survey import survey_model
from secateur.steps.runner import RunContext, Step, identity_of, source_of

FIT = "fit.json"

MOST = 2
"""How often models are chosen again, at most."""

INSTEAD: Mapping[str, tuple[str, str]] = {
    "vllm": (
        "vLLM reads one scheme for all linears from compressed-tensors, w8a8 or w4a16, and gains "
        "nothing from zeros, so there is no mix to search",
        "secateur export MODEL --to compressed-tensors --type w8a8 or w4a16 makes both candidates",
    ),
    "transformers": (
        "transformers stores and multiplies dense bfloat16, so only cuts make a model smaller or "
        "faster there",
        "secateur structure MODEL --params or --layers makes them",
    ),
    "h100": (
        "2:4 zeros and fp8 are not measured here, and a fit predicts from measurements",
        "secateur advise MODEL --hardware h100-80gb gives published and estimated numbers",
    ),
}
"""Why there is no fit for a target, and what to do."""


def plan_fit(recipe: FitRecipe, progress: Progress, call: Mapping[str, Any]) -> FitPlanResult:
    """Check a recipe and whether its bounds can be kept, and show what the fit would do.

    Args:
        recipe: recipe of the fit.
        progress: receives the matrices that are timed for a bound on speed.
        call: the other options of the call.

    Raises:
        SecateurError: as the fit would.
    """
    Fit.check(recipe)
    prepared_tasks(recipe)
    source = source_of(recipe, progress)
    model = open_model(recipe, source)
    costs = costs_of(recipe, model, progress)
    check_feasible(recipe, costs, model.file_bytes)
    read = [recipe.model, str(source.folder), *texts_of(recipe.calibration.source)]
    check_output(recipe.output, "fit", 0, read, call)
    bounds = {}
    for place, kind in enumerate(costs.kinds):
        least = costs.least(place, alone=True)
        if math.isfinite(kind.limit) and least is not None:
            name = OPTION_OF[kind.name]
            bounds[name] = f"{getattr(recipe, name)}", as_option(costs, kind.name, least)
    for name in ("max_loss_increase", "min_accuracy_kept"):
        if getattr(recipe, name) is not None:
            bounds[name] = f"{getattr(recipe, name)}", ""
    return FitPlanResult(
        linears=len(costs.shapes),
        file_bytes=model.file_bytes,
        bounds=bounds,
        formats=tuple(stored.name for stored in costs.formats),
        tokens_to_heal=recipe.tokens_to_heal,
        minutes=recipe.minutes,
    )


def open_model(recipe: FitRecipe, source: LocalCheckpoint) -> PackableCheckpoint:
    """The dense model of a recipe whose texts are there, and its matrices that can be packed."""
    for text in texts_of(recipe.calibration.source):
        check_text(text)
    refuse_quantized(source.folder)
    return PackableCheckpoint.open(source.folder, trust_remote_code=recipe.trust_remote_code)


class Fit(Step[FitRecipe, FitResult]):
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4, 3 or 2 bits, be pruned to 30 to 70 %, or
    both; embedding and head are rounded to 8, 4 or 3 bits. One survey of the model predicts what
    each of these loses. The best choices are made, healed and measured.
    """

    verb = "fit"

    def __init__(self, recipe: FitRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.tasks = prepared_tasks(recipe)
        self.model = open_model(recipe, run.source)

    @classmethod
    def check(cls, recipe: FitRecipe) -> None:
        """Refuse a target that a fit cannot serve.

        Raises:
            RecipeError: why, and what can be done.
        """
        if recipe.target in INSTEAD:
            why, remedy = INSTEAD[recipe.target]
            raise RecipeError(f"no fit for {recipe.target}: {why}", where="--target", remedy=remedy)

    @classmethod
    def reads(cls, recipe: FitRecipe) -> Iterable[str]:
        """The calibration texts."""
        return texts_of(recipe.calibration.source)

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        return {
            **identity_of(self.recipe, {"minutes"}, self.model.reader.files, self.run.progress),
            "formats": [stored.name for stored in FILES[self.recipe.target].formats],
        }

    @classmethod
    def result(cls, output: Path) -> FitResult:
        """Read the result of a finished fit from its notes."""
        return read_record(FitResult, output / NOTES / FIT)

    def work(self) -> FitResult:
        """Survey the model, make and heal candidates, judge the best one.

        Raises:
            RecipeError: no model can keep the bounds.
            VerificationError: no model that was made keeps them.
        """
        run, folder = self.run, self.run.folder
        costs = costs_of(self.recipe, self.model, run.progress)
        check_feasible(self.recipe, costs, self.model.file_bytes)
        time_budget = TimeBudget(self.recipe.minutes, folder.work / "pace.json", run.meter.started)
        context = FitContext.prepare(
            self.recipe, run.source, self.model, costs, time_budget, folder.work, run.progress
        )
        windows = context.choosing.windows
        evaluator = ModelEvaluator(context, cut_windows(windows, windows.numel()), "chosen")
        workshop = Workshop(context, survey_model(context, evaluator), evaluator)
        candidates, branches, workshop, costs = _within_loss(workshop, costs)
        if not candidates:
            raise VerificationError(
                "no model that was made keeps the bounds",
                where=str(folder.output),
                remedy="give a little more of each bound",
            )
        candidates, corrections = _correct_speed(
            workshop, heal_candidates(workshop, candidates), costs
        )
        frontier = _frontier(workshop, costs)
        winner = best_of(candidates, self.recipe.max_loss_increase)
        packed = pack_winner(run, context, winner)
        size = costs.files.finish(folder.model, run.progress)
        losses = _judge(context, folder.model, winner, candidates)
        result = FitResult(
            output=folder.output,
            kind_of={n: stored.name for n, stored in winner.formats.items() if n != EMBEDDINGS},
            embeddings=embedded(winner.formats[EMBEDDINGS]),
            winner=winner.row,
            finalists=tuple(one.row for one in candidates),
            branches=tuple(branches),
            frontier=tuple(frontier),
            losses=losses,
            costs=tuple(
                FitCost(kind.name, kind.rest, kind.limit if math.isfinite(kind.limit) else None)
                for kind in context.costs.kinds
            ),
            checks=check_bounds(context, folder.model, size, losses[WINNER], self.tasks),
            corrections=tuple(corrections),
            dropped=tuple(context.time.dropped),
            packed=packed,
            seconds=time.perf_counter() - run.meter.started,
        )
        write_json(folder.notes / FIT, result.to_json())
        save_plots([result.chart()], folder.notes / "frontier")
        return result


POINTS = 12
"""Sizes of the predicted frontier, from the smallest to the largest, each larger by one factor."""


def _frontier(workshop: Workshop, costs: Costs) -> list[FitPoint]:
    """What is predicted for some sizes: of all formats, and of rounding alone."""
    knapsack, found = workshop.predictions.knapsack(costs), list[FitPoint]()
    bare = [n for n, stored in enumerate(costs.formats) if not stored.sparsity]
    least, most = knapsack.least[0], knapsack.most[0]
    free = [math.inf] * (len(costs.kinds) - 1)
    for name, allowed in (("all formats", None), ("only rounded", bare)):
        seen = set[Candidate]()
        for step in range(POINTS):
            budget = least * (most / least) ** (step / (POINTS - 1))
            candidate = knapsack.best((budget, *free), allowed)
            if candidate is not None and candidate not in seen:
                seen.add(candidate)
                size = round(costs.rest[0] + budget)
                found.append(FitPoint(name, size, knapsack.predicted(candidate)))
    return found


Built = tuple[list[BuiltCandidate], list[FitBranch], Workshop]
"""The candidates that keep the bounds, what became of others, and the scaled predictions."""


def build_candidates(workshop: Workshop, costs: Costs, *, structure: bool = True) -> Built:
    """Make the candidates within the bounds.

    Args:
        workshop: makes and measures.
        costs: the bounds.
        structure: whether cuts take part, if the recipe has them.
    """
    context = workshop.context
    candidates, unmade, workshop = build_mixes(workshop, costs)
    structure = structure and context.recipe.structure
    if not structure or not candidates or not _has_time(context, "cuts"):
        return candidates, unmade, workshop
    structured, cuts = build_structured(workshop, best_of(candidates), costs)
    return [*candidates, *structured], [*unmade, *cuts], workshop


@dataclass(frozen=True)
class SizeBracket:
    """The sizes between which the smallest model within a loss is looked for, in bytes.

    Attributes:
        low: the largest size that is too small; at first the smallest one that is possible.
        high: of the smallest model within the loss; at first the largest size.
        fails: whether low was tried.
        holds: whether high was made.
    """

    low: float
    high: float
    fails: bool = False
    holds: bool = False

    def next(self, predicted: float) -> float:
        """The size to try: the predicted one, or the middle once both ends were measured."""
        low, high = self.low * (1 + STEP * self.fails), self.high * (1 - STEP * self.holds)
        if low <= predicted <= high and not (self.fails and self.holds):
            return predicted
        return math.sqrt(self.low * self.high)

    def after(self, made: float, *, keeps: bool) -> SizeBracket:
        """The same after a size was tried, and its model has so many bytes and keeps the bound."""
        if keeps and (made < self.high or not self.holds):
            return replace(self, high=made, holds=True)
        return replace(self, low=max(self.low, made) if self.fails else made, fails=True)

    @property
    def wide(self) -> bool:
        """Whether a size that is too small is far below."""
        return self.fails and self.low < self.high * (1 - WIDE)

    @property
    def closed(self) -> bool:
        """Whether nothing worth trying is left."""
        return self.low > self.high * (1 - STEP)


def _within_loss(
    workshop: Workshop, costs: Costs
) -> tuple[list[BuiltCandidate], list[FitBranch], Workshop, Costs]:
    """The candidates. With a bound on the loss, those of several sizes.

    The first size is where the survey predicts the bound. Models are made for it and measured on
    the windows that choose. If the rise of the loss and its standard error exceed the bound, the
    size is too small. Predictions are scaled to what was measured, and give the next size.
    """
    context, bound = workshop.context, workshop.context.recipe.max_loss_increase
    if bound is None:
        return (*build_candidates(workshop, costs), costs)
    knapsack, rest = workshop.predictions.knapsack(costs), costs.rest[0]
    most = min(rest + knapsack.most[0], costs.kinds[0].limit)
    bracket, aim, left = SizeBracket(rest + knapsack.least[0], most), bound, MADE
    made, unmade = dict[Path, BuiltCandidate](), dict[str, FitBranch]()
    for _ in range(SIZES):
        size = bracket.next(rest + _smallest(workshop, costs, aim))
        candidates, branches, workshop = build_candidates(workshop, costs.limited(0, size))
        new = [one for one in candidates if one.packed not in made]
        left -= bool(new)
        made |= {one.packed: one for one in candidates}
        unmade |= {one.name: one for one in branches}
        rise, found = math.inf, size  # where nothing new was made, sizes up to this one are known
        if candidates:
            best = best_of(candidates, bound)
            rise, found = best.rise, best.row.file_bytes if new else size
            aim *= min(max(CLOSER * bound / max(rise, 1e-9), 1 / 8), 8.0)
        bracket = bracket.after(found, keeps=rise <= bound)
        near = CLOSE * bound < rise <= bound and not bracket.wide
        if near or bracket.closed or not left or not _has_time(context, "another size"):
            break
    candidates = [*made.values()]
    if candidates:
        costs = costs.limited(0, best_of(candidates, bound).row.file_bytes)
    names = {one.row.name for one in candidates}
    branches = [one for name, one in unmade.items() if name not in names]
    return candidates, branches, workshop, costs


CLOSE, CLOSER = 0.8, 0.95
"""A loss of so much of its bound is near enough; the next size aims at so much of it."""

STEP, WIDE = 0.02, 0.1
"""As fractions of a size. Two sizes nearer than the first count as one. If they are farther apart
than the second, the search goes on although the loss is near its bound."""

MADE, SIZES = 5, 12
"""For how many sizes models are made, and how many are tried, at most: the choice for a size may be
a model that was made before."""


def _has_time(context: FitContext, what: str) -> bool:
    """Whether two more models can be made."""
    return context.time.allows(what, 2 * context.time.expected("making"))


def _smallest(workshop: Workshop, costs: Costs, bound: float) -> float:
    """The smallest size of all units with a predicted divergence within a bound."""
    knapsack = workshop.predictions.knapsack(costs)
    candidate = knapsack.cheapest(0, (*costs.aim, bound))
    size = costs.aim[0] if candidate is None else knapsack.total(candidate)[0]
    return min(size, knapsack.most[0]) / (1 - MARGINS[SIZE])


def _correct_speed(
    workshop: Workshop, candidates: list[BuiltCandidate], costs: Costs
) -> tuple[list[BuiltCandidate], list[FitCorrection]]:
    """Choose again while the best candidate decodes more slowly than its bound."""
    context, wanted = workshop.context, workshop.context.recipe.decode_speedup
    bound = context.recipe.max_loss_increase
    corrections: list[FitCorrection] = []
    speed = _measured_speedup(context, best_of(candidates, bound), 0)
    while wanted and speed is not None and misses(wanted, speed) and len(corrections) < MOST:
        best = best_of(candidates, bound)
        # the table does not know the linears of a cut
        predicted = wanted if best.cut else costs.predicted_speedup(best.formats)
        # seconds that make up for what the table promises too much
        tighter = costs.tightened(context.costs.kinds[-1].limit * (speed / predicted))
        if tighter is None:
            break
        again, _, workshop = build_candidates(workshop, tighter, structure=False)
        if not again:
            break
        again = heal_candidates(workshop, again)
        reached = _measured_speedup(context, best_of(again, bound), len(corrections) + 1)
        corrections.append(FitCorrection(predicted, speed, tighter.speedup, reached))
        if not is_faster(reached, speed):  # it has lost more, and for nothing
            break
        candidates, costs, speed = again, tighter, reached
    return candidates, corrections


def _measured_speedup(context: FitContext, candidate: BuiltCandidate, number: int) -> float | None:
    """The speed-up of a packed candidate, from the file of an earlier run or timed now."""
    if context.recipe.decode_speedup is None:
        return None
    file = context.work / f"speedup-{number}.json"
    if not file.exists():
        write_json(file, {"speedup": speedup_of(context, candidate.packed)})
    found: float | None = json.loads(file.read_text(encoding="utf-8"))["speedup"]
    return found


def misses(wanted: float, speedup: float) -> bool:
    """Whether a measured speed-up is less than the bound, by more than the error of timing."""
    return speedup < wanted * (1 - TIMING_ERROR)


def is_faster(speedup: float | None, before: float) -> bool:
    """Whether a speed-up is more than another one, by more than the error of timing."""
    return speedup is not None and speedup > before * (1 + TIMING_ERROR)


def _judge(
    context: FitContext, made: Path, winner: BuiltCandidate, candidates: Sequence[BuiltCandidate]
) -> dict[str, FitLoss]:
    """The loss of the winner and its rivals, as they run, on text with no other use."""
    rounded = [one for one in candidates if one.only_rounded]
    rivals = {
        WINNER: winner,
        ONLY_ROUNDED: best_of(rounded, context.recipe.max_loss_increase) if rounded else None,
    }
    found = {}
    for name, one in rivals.items():
        if one is not None:
            rise = context.judging.increase(made if one is winner else one.packed)
            found[name] = FitLoss(one.row.file_bytes, rise.mean, rise.standard_error)
    return found
