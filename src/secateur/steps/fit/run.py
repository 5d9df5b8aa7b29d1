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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.calibration.documents import texts_of
from secateur.engine.search.candidate_evaluator import cut_windows
from secateur.engine.search.knapsack import fits
from secateur.engine.search.stored_levels import (
    FRONTIER,
    SURVEY_TOKENS,
    FitSearch,
    LevelEvaluator,
    Point,
)
from secateur.errors import RecipeError, VerificationError
from secateur.evaluation.tasks import PreparedTask
from secateur.models.checkpoint import CheckpointReader
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.progress import Progress, listener
from secateur.recipes.compress import FitRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.prune import ChainRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
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
from secateur.runs.atomic import write_json, write_text
from secateur.runs.environment import Meter
from secateur.runs.folder import NOTES, RunFolder, check_output, file_digests
from secateur.runs.records import read_record
from secateur.runtime.storage_plan import Matrices, find_matrices
from secateur.sparsity.evolution import Evolution
from secateur.steps.compress import pack_into, rounding_record
from secateur.steps.fit.build_models import (
    chain_steps,
    chosen_values,
    make_levels,
    packing_recipe,
)
from secateur.steps.fit.candidates import (
    SINGLE,
    STRUCTURED_CANDIDATES,
    BuiltCandidate,
    MeasuredLevels,
    best_single,
    build_mixes,
    build_structured,
    choose_mixes,
    finer_knapsack,
)
from secateur.steps.fit.context import FitContext, TimeBudget
from secateur.steps.fit.costs import (
    OPTION_OF,
    SECONDS,
    Costs,
    as_option,
    check_feasible,
    costs_of,
)
from secateur.steps.fit.evaluation import (
    TIMING_ERROR,
    ModelEvaluator,
    check_bounds,
    prepared_tasks,
    speedup_of,
)
from secateur.steps.fit.storage_formats import FILES, StorageFormat
from secateur.steps.runner import RunContext

RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"

FIT = "fit.json"

MEASURED_AT_THE_END = 8
"""What packing and judging the winner and its rivals take, in measurements of one candidate."""

DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""

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


@dataclass(frozen=True)
class ExpectedSeconds:
    """Seconds that phases are expected to take, by what earlier ones took.

    Attributes:
        survey: of the layers.
        frontier: of its candidates.
        generation: of the search.
        rest: one candidate, packed and judged.
        cuts: all cuts, and one candidate among them.
    """

    survey: float
    frontier: float
    generation: float
    rest: float
    cuts: float

    @classmethod
    def of(cls, context: FitContext, search: FitSearch) -> ExpectedSeconds:
        """By the time of a level, and of measuring it."""
        each = context.time.expected("singles") / len(search.levels)
        share = min(1.0, SURVEY_TOKENS / search.tokens)
        drawn = context.recipe.offspring * min(1.0, DRAWN_TOKENS / search.tokens)
        rest = context.time.expected("prune", "round") + MEASURED_AT_THE_END * each
        cut = context.time.expected("prune") + each
        return cls(
            survey=len(context.target.layers) * each * share,
            frontier=2 * FRONTIER * each,
            generation=(drawn + 2) * each,
            rest=rest,
            cuts=len(STRUCTURED_CANDIDATES) * cut + rest,
        )


@takes_options_of(FitRecipe)
def fit(
    model: str | Path, *, progress: Progress | None = None, **options: Any
) -> FitResult | FitPlanResult:
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4 or 3 bits, be pruned to 50 or 70 %, or both.
    A search measured on the whole model chooses, and the winner is packed.

    Args:
        model: folder, hub id, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The winner, the frontier, and what each single technique gives; with `dry_run` the plan.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(FitRecipe, {"model": model}, options)
    if call.pop("dry_run", False):
        return plan_fit(recipe, listener(progress), call)
    return fit_recipe(recipe, listener(progress), **call)


def plan_fit(recipe: FitRecipe, progress: Progress, call: Mapping[str, Any]) -> FitPlanResult:
    """Check a recipe and whether its bounds can be kept, and show what the fit would do.

    Args:
        recipe: recipe of the fit.
        progress: receives the matrices that are timed for a bound on speed.
        call: the other options of the call.

    Raises:
        SecateurError: as the fit would.
    """
    check_target(recipe)
    prepared_tasks(recipe)
    source, reader, matrices = _open_model(recipe, progress)
    costs = costs_of(recipe, reader, matrices, progress)
    size = sum(file.stat().st_size for file in reader.files)
    check_feasible(recipe, costs, size)
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
        file_bytes=size,
        bounds=bounds,
        levels=tuple(level.name for level in costs.levels),
        generations=recipe.generations,
        offspring=recipe.offspring,
        minutes=recipe.minutes,
    )


def fit_recipe(
    recipe: FitRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Carry out a recipe into a new folder.

    Args:
        recipe: the recipe.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
    """
    begun = time.perf_counter()
    check_target(recipe)
    tasks = prepared_tasks(recipe)
    folder = RunFolder(recipe.output, "fit", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model, *texts_of(recipe.calibration.source))
    source, reader, matrices = _open_model(recipe, progress)
    folder.keep_apart(source.folder)
    with folder:
        identity = {
            **recipe.model_dump(mode="json", exclude={"output", "memory", "minutes"}),
            "micro_batch_tokens": recipe.memory.micro_batch_tokens,
            "levels": [level.name for level in FILES[recipe.target].levels],
            "source_files": file_digests(reader.files, progress),
        }
        folder.begin(identity)
        if folder.finished:
            return read_record(FitResult, folder.notes / FIT)
        costs = costs_of(recipe, reader, matrices, progress)
        check_feasible(recipe, costs, sum(file.stat().st_size for file in reader.files))
        time_budget = TimeBudget(recipe.minutes, folder.work / "pace.json", begun)
        context = FitContext.prepare(
            recipe, source, reader, matrices, costs, time_budget, folder.work, progress
        )
        result = run_fit(context, folder, tasks, begun)
        write_json(folder.notes / FIT, result.to_json())
        save_plots([result.chart()], folder.notes / "frontier")
        folder.finish()
    return result


def _open_model(
    recipe: FitRecipe, progress: Progress
) -> tuple[LocalCheckpoint, CheckpointReader, Matrices]:
    """Open the model: the checkpoint, its tensors, and the matrices that can be packed."""
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code, progress=progress)
    refuse_quantized(source.folder)
    reader = CheckpointReader(source.folder)
    return source, reader, find_matrices(reader, "int8", recipe.trust_remote_code)


def check_target(recipe: FitRecipe) -> None:
    """Refuse a target that a fit cannot serve.

    Raises:
        RecipeError: why, and what can be done.
    """
    if recipe.target in INSTEAD:
        why, remedy = INSTEAD[recipe.target]
        raise RecipeError(f"no fit for {recipe.target}: {why}", where="--target", remedy=remedy)


def run_fit(
    context: FitContext, folder: RunFolder, tasks: Sequence[PreparedTask], begun: float
) -> FitResult:
    """Make levels, search, make the candidates, pack the best one and judge it.

    Args:
        context: of the fit.
        folder: of the run, opened.
        tasks: for the accuracy; none if it has no bound.
        begun: when the run began.

    Raises:
        VerificationError: no model that was made keeps the bounds.
    """
    search = make_search(context)
    with context.time.phase("singles"):
        search.singles()
    expected = ExpectedSeconds.of(context, search)
    measured, costs = survey_levels(context, search, expected)
    built = build_candidates(context, measured, expected, costs)
    (candidates, cuts), costs = _within_loss(context, measured, expected, built, costs)
    if not candidates:
        raise VerificationError(
            "no model that was made keeps the bounds",
            where=str(folder.output),
            remedy="give a little more of each bound",
        )
    candidates, packed, corrections = _correct_speed(
        context, folder, measured, expected, candidates, costs, begun
    )
    winner = best_of(candidates)
    size = context.costs.files.finish(folder.model, context.progress)
    losses = _judge(context, folder.model, winner, candidates)
    return FitResult(
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
        checks=check_bounds(context, folder.model, size, losses[WINNER], tasks),
        corrections=tuple(corrections),
        dropped=tuple(context.time.dropped),
        packed=packed,
        seconds=time.perf_counter() - begun,
    )


def make_search(context: FitContext) -> FitSearch:
    """A search among the levels, which are made now."""
    levels = list(make_levels(context))
    made = list(zip(context.costs.levels, levels, strict=True))
    costs = {
        n: [context.costs.of(n, stored, one.bytes_of[n]) for stored, one in made]
        for n in context.stored
    }
    windows, file = context.choosing.windows, context.work / "search.jsonl"
    return FitSearch(context.target, levels, costs, windows, file, context.progress)


def survey_levels(
    context: FitContext, search: FitSearch, expected: ExpectedSeconds
) -> tuple[MeasuredLevels, Costs]:
    """Survey the layers, measure the frontier, and settle the bounds; as far as there is time.

    Args:
        context: of the fit.
        search: all levels are measured.
        expected: seconds of what follows.

    Returns:
        What was measured, and the bounds of the search.
    """
    frontier: list[Point] = []
    costs = context.costs
    if context.time.allows("the survey and the search", expected.survey + expected.rest):
        # the layers go to the middle of what they may lose
        probes = (StorageFormat("int4", 0.5), StorageFormat("int4", 0.0))
        search.survey(next(costs.levels.index(one) for one in probes if one in costs.levels))
        if context.time.allows("the frontier", expected.frontier + expected.rest):
            budgets = search.budgets(costs.axis)
            for families in ("all", "quantize"):
                frontier += search.frontier(budgets, families)
        costs = _costs_within(context, search, context.recipe.max_loss_increase)
    singles = search.singles()  # with the survey's predictions; nothing is measured again
    windows = context.choosing.windows
    evaluator = ModelEvaluator(context, cut_windows(windows, windows.numel()), "searched")
    return MeasuredLevels(
        search, finer_knapsack(context, search), singles, frontier, evaluator
    ), costs


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


def build_candidates(
    context: FitContext,
    measured: MeasuredLevels,
    expected: ExpectedSeconds,
    costs: Costs,
    *,
    structure: bool = True,
) -> Built:
    """Search within budgets, and make the candidates that keep them.

    Args:
        context: of the fit.
        measured: the levels; without a survey of the layers, only single levels take part.
        expected: seconds of what follows.
        costs: the bounds.
        structure: whether cuts take part, if the recipe has them.
    """
    found = _search_mixes(context, measured, expected, costs)
    alone = best_single(context, measured, costs.budget)
    most = costs.kinds[0].limit
    candidates = [x for x in (alone, *found) if x is not None and x.row.file_bytes <= most]
    structure = structure and context.recipe.structure
    if not structure or not candidates or not context.time.allows("cuts", expected.cuts):
        return candidates, []
    structured, cuts = build_structured(context, measured, best_of(candidates), costs)
    return [*candidates, *structured], cuts


def _search_mixes(
    context: FitContext, measured: MeasuredLevels, expected: ExpectedSeconds, costs: Costs
) -> list[BuiltCandidate]:
    """Search from the best points, and make what was found; nothing without a survey."""
    search, inside = measured.search, costs.aim
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
        seconds = expected.generation + expected.rest
        return context.time.allows("generations of the search", seconds)

    winner = search.refined(starts, inside, _evolution(context.recipe, search.tokens), goes_on)
    return build_mixes(context, measured, choose_mixes(measured, winner, inside), expected.rest)


def _evolution(recipe: FitRecipe, tokens: int) -> Evolution:
    """The parameters of the search on so many tokens."""
    return Evolution(
        generations=recipe.generations,
        offspring=recipe.offspring,
        stages=((2, min(DRAWN_TOKENS, tokens)), (1, tokens)),
        seed=recipe.calibration.seed,
        tries=4,
        revisits=False,
    )


def best_of(candidates: Sequence[BuiltCandidate]) -> BuiltCandidate:
    """The candidate that diverges least from the dense model."""
    return min(candidates, key=lambda one: one.divergence)


def _within_loss(
    context: FitContext,
    measured: MeasuredLevels,
    expected: ExpectedSeconds,
    built: Built,
    costs: Costs,
) -> tuple[Built, Costs]:
    """Search again, for a larger model, while the best candidate loses more than its bound.

    The search only estimates the loss, without the embeddings. So the packed model is measured on
    the windows that choose. If its rise and the standard error exceed the bound, the next search
    has a bound that is lower by the excess.
    """
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
        built = build_candidates(context, measured, expected, costs)
    return built, costs


def _correct_speed(
    context: FitContext,
    folder: RunFolder,
    measured: MeasuredLevels,
    expected: ExpectedSeconds,
    candidates: list[BuiltCandidate],
    costs: Costs,
    begun: float,
) -> tuple[list[BuiltCandidate], CompressResult, list[FitCorrection]]:
    """Pack the best candidate, and search again while it decodes more slowly than its bound."""
    packed = _pack_winner(folder, context, best_of(candidates), begun)
    corrections: list[FitCorrection] = []
    speed = _measured_speedup(context, folder.model, 0)
    while speed is not None and misses(context, speed) and len(corrections) < MOST:
        predicted = _predicted_speedup(context, costs, best_of(candidates))
        tighter = _tightened(context, costs, speed / predicted)
        if tighter is None:
            break
        again, _ = build_candidates(context, measured, expected, tighter, structure=False)
        if not again:
            break
        packed_again = _pack_winner(folder, context, best_of(again), begun)
        reached = _measured_speedup(context, folder.model, len(corrections) + 1)
        corrections.append(FitCorrection(predicted, speed, tighter.speedup, reached))
        if not is_faster(reached, speed):  # it has lost more, and for nothing
            packed = _pack_winner(folder, context, best_of(candidates), begun)
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


def misses(context: FitContext, speedup: float) -> bool:
    """Whether a measured speed-up is less than the bound, by more than the error of timing."""
    wanted = context.recipe.decode_speedup
    return wanted is not None and speedup < wanted * (1 - TIMING_ERROR)


def is_faster(speedup: float | None, before: float) -> bool:
    """Whether a speed-up is more than another one, by more than the error of timing."""
    return speedup is not None and speedup > before * (1 + TIMING_ERROR)


def _predicted_speedup(context: FitContext, costs: Costs, winner: BuiltCandidate) -> float:
    """The speed-up that the table of times predicts for a winner; the bound for a cut one."""
    assert costs.times is not None
    if winner.cut:
        return float(context.recipe.decode_speedup or 1.0)
    linears = sum(costs.seconds(costs.shapes[name], one) for name, one in winner.formats.items())
    return costs.times.base / (costs.times.rest + linears)


def _tightened(context: FitContext, costs: Costs, ratio: float) -> Costs | None:
    """Bounds that make up for what the table promises too much."""
    wanted, place = context.recipe.decode_speedup, costs.place(SECONDS)
    assert wanted is not None
    assert place is not None
    assert costs.times is not None
    seconds, least = costs.kinds[place], costs.least(place)
    if least is None or least > seconds.limit * (1 - TIMING_ERROR / 5):
        return None
    return costs.limited(place, max(min(seconds.limit, costs.times.base / wanted * ratio), least))


def _pack_winner(
    folder: RunFolder, context: FitContext, winner: BuiltCandidate, begun: float
) -> CompressResult:
    """Pack the winner into the folder of the run, and write the recipe that makes it again."""
    recipe = context.recipe
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
    report = pack_into(RunContext(folder, source, context.progress, Meter(begun)), compress, chosen)
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
