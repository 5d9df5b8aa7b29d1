"""`secateur fit`: a bound in, the best packed model within it out.

    levels ─► survey ─► search ─► candidates, made and measured ─► the best one packed and judged

| target                   | what a fit does                                                   |
|--------------------------|-------------------------------------------------------------------|
| cpu                      | all levels: our formats and kernels, timed on this machine        |
| any                      | all levels, no bound on time or memory: these belong to an engine |
| llama.cpp                | what a GGUF file holds; bounds on size and loss                   |
| vllm, transformers, h100 | refused, with what does the work instead                          |

The search is corrected where the winner decodes more slowly than the table of times predicts.
Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner and dense int8 are timed in turns. If the
winner misses the speed-up, the search runs once more with a bound that is tighter by the same
factor:

    seconds' = seconds · measured speed-up / predicted speed-up

The new winner stays only if it is faster by more than the error of timing; it has lost more. What
was measured is kept, so a resumed run decides the same.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.knapsack import fits
from secateur.engine.search.stored_levels import (
    FitSearch,
    LevelEvaluator,
    Point,
)
from secateur.errors import RecipeError, VerificationError
from secateur.evaluation.task_data import check_request
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.prune import ChainRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.recipes.shared import texts_of
from secateur.reporting.charts import save_plots
from secateur.reporting.fit import (
    ONLY_ROUNDED,
    WINNER,
    FitBranch,
    FitCorrection,
    FitCost,
    FitLoss,
    FitResult,
)
from secateur.reporting.models import CompressResult
from secateur.reporting.plan import FitPlanResult
from secateur.runs.folder import NOTES, check_output, file_digests
from secateur.runs.output import write_json, write_text
from secateur.runs.records import read_record
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Evolution
from secateur.steps.compress import pack_into, rounding_record
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
    SINGLE,
    STRUCTURED_CANDIDATES,
    BuiltCandidate,
    MeasuredLevels,
    best_single,
    build_mixes,
    build_structured,
    finer_knapsack,
)
from secateur.steps.fitting.context import DRAWN_TOKENS, ExpectedSeconds, FitContext, TimeBudget
from secateur.steps.fitting.costs import (
    Costs,
    costs_of,
)
from secateur.steps.fitting.models import (
    ModelEvaluator,
    chain_steps,
    chosen_values,
    make_levels,
    packing_recipe,
)
from secateur.steps.fitting.storage_formats import FILES, StorageFormat
from secateur.steps.runner import RunContext, Step, source_of

RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"

FIT = "fit.json"

MOST = 2
"""Number of searches after the first one, at most."""

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

Built = tuple[list[BuiltCandidate], list[FitBranch]]
"""The candidates that keep the bounds, and what became of every cut."""


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
        levels=tuple(level.name for level in costs.levels),
        generations=recipe.generations,
        offspring=recipe.offspring,
        minutes=recipe.minutes,
    )


def open_model(recipe: FitRecipe, source: LocalCheckpoint) -> PackableCheckpoint:
    """The dense model of a recipe, and its matrices that can be packed."""
    refuse_quantized(source.folder)
    return PackableCheckpoint.open(source.folder, trust_remote_code=recipe.trust_remote_code)


class Fit(Step[FitRecipe, FitResult]):
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4 or 3 bits, be pruned to 50 or 70 %, or both.
    A search measured on the whole model chooses, and the winner is packed.
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
            **self.recipe.model_dump(mode="json", exclude={"output", "memory", "minutes"}),
            "micro_batch_tokens": self.recipe.memory.micro_batch_tokens,
            "levels": [level.name for level in FILES[self.recipe.target].levels],
            "source_files": file_digests(self.model.reader.files, self.run.progress),
        }

    @classmethod
    def result(cls, output: Path) -> FitResult:
        """Read the result of a finished fit from its notes."""
        return read_record(FitResult, output / NOTES / FIT)

    def work(self) -> FitResult:
        """Make levels, search, make the candidates, pack the best one and judge it.

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
        measured, costs = survey_levels(context)
        (candidates, cuts), costs = _within_loss(measured, costs)
        if not candidates:
            raise VerificationError(
                "no model that was made keeps the bounds",
                where=str(folder.output),
                remedy="give a little more of each bound",
            )
        candidates, packed, corrections = _correct_speed(run, measured, candidates, costs)
        winner = best_of(candidates)
        size = costs.files.finish(folder.model, run.progress)
        losses = _judge(context, folder.model, winner, candidates)
        result = FitResult(
            output=folder.output,
            kind_of={name: stored.name for name, stored in winner.formats.items()},
            winner=winner.row,
            finalists=tuple(one.row for one in candidates),
            branches=tuple(cuts),
            singles=tuple(measured.singles),
            frontier=tuple(measured.frontier),
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


def make_search(context: FitContext) -> FitSearch:
    """A search among the levels, which are made now."""
    levels = list(make_levels(context))
    made = list(zip(context.costs.levels, levels, strict=True))
    costs = {
        n: [context.costs.of(n, stored, one.bytes_of[n]) for stored, one in made]
        for n in context.model.linears
    }
    windows, file = context.choosing.windows, context.work / "search.jsonl"
    return FitSearch(context.target, levels, costs, windows, file, context.progress)


def survey_levels(context: FitContext) -> tuple[MeasuredLevels, Costs]:
    """Make and measure the levels, survey the layers, measure the frontier; as far as time allows.

    Returns:
        What was measured, and the bounds of the search: with a bound on the loss, the smallest
        size within it.
    """
    search, costs = make_search(context), context.costs
    with context.time.phase("singles"):
        search.singles()
    expected = ExpectedSeconds.of(context, search, len(STRUCTURED_CANDIDATES))
    frontier: list[Point] = []
    if context.time.allows("the survey and the search", expected.survey + expected.rest):
        # the layers go to the middle of what they may lose
        probes = (StorageFormat("int4", 0.5), StorageFormat("int4", 0.0))
        search.survey(next(costs.levels.index(one) for one in probes if one in costs.levels))
        if context.time.allows("the frontier", expected.frontier + expected.rest):
            budgets = search.budgets(costs.axis)
            for families in ("all", "quantize"):
                frontier += search.frontier(budgets, families)
        costs = _costs_within(context, search, context.recipe.max_loss_increase)
    windows = context.choosing.windows
    evaluator = ModelEvaluator(context, cut_windows(windows, windows.numel()), "chosen")
    singles = search.singles()  # with the survey's predictions; nothing is measured again
    finer = finer_knapsack(context.costs, search)
    return MeasuredLevels(context, expected, search, finer, singles, frontier, evaluator), costs


def _costs_within(context: FitContext, search: FitSearch, bound: float | None) -> Costs:
    """The bounds after the survey: with a bound on the loss, the smallest size within it."""
    if bound is None:
        return context.costs
    windows, levels = context.choosing.windows, search.levels
    losses = LevelEvaluator(
        context.target, levels, search.names, windows, "loss",
        context.work / "losses.jsonl", context.progress,
    )  # fmt: skip
    return context.costs.narrowed(search.smallest_within(losses, context.costs.aim, bound))


def build_candidates(measured: MeasuredLevels, costs: Costs, *, structure: bool = True) -> Built:
    """Search within budgets, and make the candidates that keep them.

    Args:
        measured: the levels; without a survey of the layers, only single levels take part.
        costs: the bounds.
        structure: whether cuts take part, if the recipe has them.
    """
    context, found = measured.context, _search_mixes(measured, costs)
    alone = best_single(measured, costs.budget)
    most = costs.kinds[0].limit
    candidates = [x for x in (alone, *found) if x is not None and x.row.file_bytes <= most]
    structure = structure and context.recipe.structure
    if not structure or not candidates or not context.time.allows("cuts", measured.expected.cuts):
        return candidates, []
    structured, cuts = build_structured(measured, best_of(candidates), costs)
    return [*candidates, *structured], cuts


def _search_mixes(measured: MeasuredLevels, costs: Costs) -> list[BuiltCandidate]:
    """Search from the best points, and make what was found; nothing without a survey."""
    context, search, inside = measured.context, measured.search, costs.aim
    if not search.is_surveyed:
        return []
    quantized = search.knapsack.best(inside, search.allowed("quantize"))
    points = [*measured.singles, *measured.frontier]
    starts = [p.candidate for p in points if fits(p.cost, inside)]
    starts += [c for c in (search.knapsack.best(inside), quantized) if c is not None]
    starts += search.between(inside)
    if not starts:
        return []

    def goes_on() -> bool:
        seconds = measured.expected.generation + measured.expected.rest
        return context.time.allows("generations of the search", seconds)

    evolution = Evolution(
        generations=context.recipe.generations,
        offspring=context.recipe.offspring,
        stages=((2, min(DRAWN_TOKENS, search.tokens)), (1, search.tokens)),
        seed=context.recipe.calibration.seed,
        tries=4,
        revisits=False,
    )
    winner = search.refined(starts, inside, evolution, goes_on)
    return build_mixes(measured, winner.candidate, inside)


def best_of(candidates: Sequence[BuiltCandidate]) -> BuiltCandidate:
    """The candidate that diverges least from the dense model."""
    return min(candidates, key=lambda one: one.divergence)


def _within_loss(measured: MeasuredLevels, costs: Costs) -> tuple[Built, Costs]:
    """The candidates; search again, for a larger model, while the best one loses too much.

    The search only estimates the loss, without the embeddings. So the packed model is measured on
    the windows that choose. If its rise and the standard error exceed the bound, the next search
    has a bound that is lower by the excess.
    """
    context, built = measured.context, build_candidates(measured, costs)
    bound = aim = context.recipe.max_loss_increase
    if bound is None or aim is None or not measured.search.is_surveyed:
        return built, costs
    for _ in range(MOST):
        if not built[0]:
            break
        excess = context.choosing.increase(best_of(built[0]).packed).cautious - bound
        if excess <= 0 or aim <= 0:
            break
        aim = max(aim - excess, 0.0)
        larger = _costs_within(context, measured.search, aim)
        if larger.kinds[0].limit <= costs.kinds[0].limit:
            break
        costs = larger
        built = build_candidates(measured, costs)
    return built, costs


def _correct_speed(
    run: RunContext, measured: MeasuredLevels, candidates: list[BuiltCandidate], costs: Costs
) -> tuple[list[BuiltCandidate], CompressResult, list[FitCorrection]]:
    """Pack the best candidate, and search again while it decodes more slowly than its bound."""
    context, made = measured.context, run.folder.model
    packed = _pack_winner(run, context, best_of(candidates))
    corrections: list[FitCorrection] = []
    wanted, speed = context.recipe.decode_speedup, _measured_speedup(context, made, 0)
    while wanted and speed is not None and misses(wanted, speed) and len(corrections) < MOST:
        best = best_of(candidates)
        # the table does not know the linears of a cut
        predicted = wanted if best.cut else costs.predicted_speedup(best.formats)
        # seconds that make up for what the table promises too much
        tighter = costs.tightened(context.costs.kinds[-1].limit * (speed / predicted))
        if tighter is None:
            break
        again, _ = build_candidates(measured, tighter, structure=False)
        if not again:
            break
        packed_again = _pack_winner(run, context, best_of(again))
        reached = _measured_speedup(context, made, len(corrections) + 1)
        corrections.append(FitCorrection(predicted, speed, tighter.speedup, reached))
        if not is_faster(reached, speed):  # it has lost more, and for nothing
            packed = _pack_winner(run, context, best_of(candidates))
            break
        candidates, costs, packed, speed = again, tighter, packed_again, reached
    return candidates, packed, corrections


def _measured_speedup(context: FitContext, made: Path, number: int) -> float | None:
    """The speed-up of a packed winner, from the file of an earlier run or timed now."""
    if context.recipe.decode_speedup is None:
        return None
    file = context.work / f"speedup-{number}.json"
    if not file.exists():
        write_json(file, {"speedup": speedup_of(context, made)})
    found: float | None = json.loads(file.read_text(encoding="utf-8"))["speedup"]
    return found


def misses(wanted: float, speedup: float) -> bool:
    """Whether a measured speed-up is less than the bound, by more than the error of timing."""
    return speedup < wanted * (1 - TIMING_ERROR)


def is_faster(speedup: float | None, before: float) -> bool:
    """Whether a speed-up is more than another one, by more than the error of timing."""
    return speedup is not None and speedup > before * (1 + TIMING_ERROR)


def _pack_winner(run: RunContext, context: FitContext, winner: BuiltCandidate) -> CompressResult:
    """Pack the winner into the folder of the run, and write the recipe that makes it again."""
    recipe, folder = context.recipe, run.folder
    text = f"{recipe.output}/{NOTES}/{WINDOWS}"
    steps = chain_steps(recipe, winner.formats, text)
    if winner.cut:
        [[verb, given]] = winner.cut.items()
        steps.insert(0, {verb: {**given, "calibration": {"source": text}}})
    rounding = rounding_record(winner.folder) if "calibration" in steps[-1]["compress"] else {}
    if rounding:
        rounding["calibration"] = {**rounding["calibration"], "source": text}
    chosen = chosen_values(recipe, winner.folder, winner.formats, rounding)
    source = replace(context.source, folder=winner.sparse)
    compress = packing_recipe(recipe, winner.formats)
    report = pack_into(replace(run, source=source), compress, chosen)
    shutil.copyfile(context.calibration_file, folder.notes / WINDOWS)
    if winner.cut:
        shutil.copytree(winner.base / NOTES, folder.notes / "steps" / "structure")
    chain = {
        "model": recipe.model,
        "output": f"{recipe.output}-again",
        "steps": steps,
        "trust_remote_code": recipe.trust_remote_code,
    }
    write_text(folder.notes / RECIPE, dump_recipe(build_recipe(ChainRecipe, chain)))
    # the card and the notes name places of the result, and none among the work of the run
    places = {str(context.calibration_file): text}
    places |= {str(one): str(recipe.output) for one in (winner.sparse, winner.folder, winner.base)
               if one != context.source.folder}  # fmt: skip
    notes = [file for file in folder.notes.rglob("*") if file.suffix in (".json", ".yaml")]
    for file in (folder.model / "README.md", *notes):
        content = file.read_text(encoding="utf-8")
        for work, result in places.items():
            content = content.replace(work, result)
        write_text(file, content)
    return report


def _judge(
    context: FitContext, made: Path, winner: BuiltCandidate, candidates: Sequence[BuiltCandidate]
) -> dict[str, FitLoss]:
    """The loss of the winner and its rivals, as they run, on text that made and chose none."""
    rounded = [one for one in candidates if one.only_rounded]
    rivals = {
        WINNER: winner,
        SINGLE: next((one for one in candidates if one.row.name == SINGLE), None),
        ONLY_ROUNDED: min(rounded, key=lambda one: one.divergence, default=None),
    }
    found = {}
    for name, one in rivals.items():
        if one is not None:
            rise = context.judging.increase(made if one is winner else one.packed)
            found[name] = FitLoss(one.row.file_bytes, rise.mean, rise.standard_error)
    return found
