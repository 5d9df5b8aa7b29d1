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
from pathlib import Path
from typing import Any

from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.errors import RecipeError, VerificationError
from secateur.evaluation.task_data import check_request
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
    """The dense model of a recipe, and its matrices that can be packed."""
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
        """Refuse a target that a fit cannot serve, and unknown tasks.

        Raises:
            RecipeError: why, and what can be done.
        """
        if recipe.target in INSTEAD:
            why, remedy = INSTEAD[recipe.target]
            raise RecipeError(f"no fit for {recipe.target}: {why}", where="--target", remedy=remedy)
        if recipe.min_accuracy_kept is not None:
            check_request(recipe.tasks, source=recipe.task_data, limit=recipe.limit, shots=0)

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
        frontier = _frontier(workshop, costs)
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
        winner = best_of(candidates)
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
        for step in range(POINTS):
            budget = least * (most / least) ** (step / (POINTS - 1))
            candidate = knapsack.best((budget, *free), allowed)
            if candidate is not None:
                size = round(costs.rest[0] + knapsack.total(candidate)[0])
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
    expected = 2 * context.time.expected("making")
    if not structure or not candidates or not context.time.allows("cuts", expected):
        return candidates, unmade, workshop
    structured, cuts = build_structured(workshop, best_of(candidates), costs)
    return [*candidates, *structured], [*unmade, *cuts], workshop


def best_of(candidates: Sequence[BuiltCandidate]) -> BuiltCandidate:
    """The candidate that diverges least from the dense model."""
    return min(candidates, key=lambda one: one.divergence)


def _within_loss(
    workshop: Workshop, costs: Costs
) -> tuple[list[BuiltCandidate], list[FitBranch], Workshop, Costs]:
    """The candidates. With a bound on the loss, the smallest ones whose measured loss is within it.

    The survey predicts the divergence, and the size is chosen by it. The packed model is measured
    on the windows that choose. If its rise and the standard error exceed the bound, or are far
    below it, the next size is chosen with predictions that are scaled to what was measured.
    """
    context, bound = workshop.context, workshop.context.recipe.max_loss_increase
    if bound is None:
        return (*build_candidates(workshop, costs), costs)
    aim, kept = bound, None
    for _ in range(MOST + 1):
        narrowed = costs.narrowed(_smallest(workshop, costs, aim))
        candidates, branches, workshop = build_candidates(workshop, narrowed)
        built = candidates, branches, workshop, narrowed
        if not candidates:
            break
        rise = context.choosing.increase(best_of(candidates).packed).cautious
        if rise <= bound:
            kept = built
            if rise > CLOSE * bound:
                break
        aim *= min(max(CLOSER * bound / max(rise, 1e-9), 1 / 8), 8.0)
    return kept or built


CLOSE, CLOSER = 0.8, 0.95
"""A loss of so much of its bound is near enough; the next size aims at so much of it."""


def _smallest(workshop: Workshop, costs: Costs, bound: float) -> float:
    """The smallest size of all units with a predicted divergence within a bound, by bisection."""
    knapsack = workshop.predictions.knapsack(costs)
    low, high = knapsack.least[0], min(costs.aim[0], knapsack.most[0])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        candidate = knapsack.best((middle, *costs.aim[1:]))
        within = candidate is not None and knapsack.predicted(candidate) <= bound
        low, high = (low, middle) if within else (middle, high)
    return high / (1 - MARGINS[SIZE])


BISECTIONS = 16


def _correct_speed(
    workshop: Workshop, candidates: list[BuiltCandidate], costs: Costs
) -> tuple[list[BuiltCandidate], list[FitCorrection]]:
    """Choose again while the best candidate decodes more slowly than its bound."""
    context, wanted = workshop.context, workshop.context.recipe.decode_speedup
    corrections: list[FitCorrection] = []
    speed = _measured_speedup(context, best_of(candidates), 0)
    while wanted and speed is not None and misses(wanted, speed) and len(corrections) < MOST:
        best = best_of(candidates)
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
        reached = _measured_speedup(context, best_of(again), len(corrections) + 1)
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
    """The loss of the winner and its rivals, as they run, on text that made and chose none."""
    rounded = [one for one in candidates if one.only_rounded]
    rivals = {
        WINNER: winner,
        ONLY_ROUNDED: min(rounded, key=lambda one: one.divergence, default=None),
    }
    found = {}
    for name, one in rivals.items():
        if one is not None:
            rise = context.judging.increase(made if one is winner else one.packed)
            found[name] = FitLoss(one.row.file_bytes, rise.mean, rise.standard_error)
    return found
