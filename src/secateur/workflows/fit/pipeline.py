"""A fit from levels to the winner: survey, search, candidates, the winner packed and measured.

The search is corrected where the winner decodes more slowly than the table of times predicts.
Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner and dense int8 are timed in turns. If the
winner misses the speed-up, the search runs once more with a bound that is tighter by the same
factor:

    seconds' = seconds · measured speed-up / predicted speed-up

The new winner stays only if it is faster by more than the error of timing; it has lost more. What
was measured is kept, so a resumed run goes the same way.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.engine.choose.candidate_evaluator import cut_windows
from secateur.engine.choose.knapsack import Knapsack, fits
from secateur.engine.choose.stored_levels import FRONTIER, SURVEY_TOKENS, FitSearch, Point
from secateur.errors import VerificationError
from secateur.evaluation.tasks import PreparedTask
from secateur.recipes.chain import ChainRecipe
from secateur.recipes.fit import FitRecipe
from secateur.recipes.reading import build_recipe, dump_recipe
from secateur.reporting.results.compress import CompressResult
from secateur.reporting.results.fit import (
    ONLY_ROUNDED,
    WINNER,
    FitBranch,
    FitCorrection,
    FitCost,
    FitLoss,
    FitResult,
)
from secateur.runs.atomic import write_json, write_text
from secateur.runs.folder import NOTES, RunFolder
from secateur.sparsity.evolution import Evolution
from secateur.workflows.compress.pack import pack_into
from secateur.workflows.compress.rounding import rounding_record
from secateur.workflows.fit.build_models import chosen_values, made_levels, packing_recipe, steps_of
from secateur.workflows.fit.candidates import (
    BRANCHES,
    SINGLE,
    Finalist,
    branched,
    finalists,
    finer_knapsack,
    mixes,
    single,
)
from secateur.workflows.fit.context import Ground
from secateur.workflows.fit.costs import SECONDS, Costs
from secateur.workflows.fit.evaluation import (
    TIMING_ERROR,
    LossMeter,
    Yardstick,
    checks_of,
    smallest_within,
    speedup_of,
)
from secateur.workflows.fit.storage_formats import probe_of

MEASURED_AT_THE_END = 8
"""What packing and judging the winner and its rivals take, in measurements of one candidate."""


DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""


MOST = 2
"""Number of searches after the first one, at most."""


RECIPE, WINDOWS = "recipe.yaml", "windows.safetensors"


def carry_out(
    ground: Ground, folder: RunFolder, tasks: Sequence[PreparedTask], begun: float
) -> FitResult:
    """Make levels, search, make the finalists, pack the best one and judge it.

    Args:
        ground: of the fit.
        folder: of the run, opened.
        tasks: for the accuracy; none if it has no bound.
        begun: when the run began.

    Raises:
        VerificationError: no model that was made keeps the bounds.
    """
    search = new_search(ground)
    with ground.pace.phase("singles"):
        singles = search.singles()
    frontier, costs = surveyed(ground, search)
    singles = search.singles()  # with the survey's predictions; nothing is measured again
    contest, branches = contested(ground, search, singles, frontier, costs)
    contest, branches, costs = within_loss(
        ground, search, (singles, frontier), (contest, branches), costs
    )
    if not contest:
        raise VerificationError(
            "no model that was made keeps the bounds",
            where=str(folder.output),
            remedy="give a little more of each bound",
        )
    contest, packed, corrections = corrected_contest(
        ground, folder, search, (singles, frontier), contest, costs, begun
    )
    winner = best_of(contest)
    size = ground.costs.files.finish(folder.model, ground.progress)
    losses = judged(ground, folder.model, winner, contest)
    return FitResult(
        output=folder.output,
        kind_of={name: kind.name for name, kind in winner.kinds.items()},
        winner=winner.told,
        finalists=tuple(one.told for one in contest),
        branches=tuple(branches),
        singles=tuple(singles),
        frontier=tuple(frontier),
        losses=losses,
        costs=told_costs(ground.costs),
        checks=checks_of(ground, folder.model, size, losses[WINNER], tasks),
        corrections=tuple(corrections),
        dropped=tuple(ground.pace.dropped),
        packed=packed,
        seconds=time.perf_counter() - begun,
    )


def new_search(ground: Ground) -> FitSearch:
    """A search among the levels, which are made now."""
    levels = list(made_levels(ground))
    made = list(zip(ground.costs.levels, levels, strict=True))
    costs = {
        n: [ground.costs.of(n, kind, one.level.bytes_of[n]) for kind, one in made]
        for n in ground.stored
    }
    file = ground.work / "search.jsonl"
    return FitSearch(ground.target, levels, costs, ground.searched, file, ground.progress)


def surveyed(ground: Ground, search: FitSearch) -> tuple[list[Point], Costs]:
    """Survey the layers, measure the frontier, and settle the bounds; as far as there is time.

    Returns:
        The frontier, and the bounds of the search.
    """
    times = Expected.of(ground, search)
    if not ground.pace.allows("the survey and the search", times.survey + times.rest):
        return [], ground.costs
    search.survey(probe_of(ground.costs.levels))
    frontier: list[Point] = []
    if ground.pace.allows("the frontier", times.frontier + times.rest):
        budgets = search.budgets(ground.costs.axis)
        for families in ("all", "quantize"):
            frontier += search.frontier(budgets, families)
    return frontier, costs_within(ground, search, ground.recipe.max_loss_increase)


def costs_within(ground: Ground, search: FitSearch, bound: float | None) -> Costs:
    """The bounds after the survey: with a bound on the loss, the smallest size within it."""
    if bound is None:
        return ground.costs
    file = ground.work / "losses.jsonl"
    meter = LossMeter.on(ground.searched, ground, search.names, search.levels, file)
    aim = ground.costs.aim
    least = smallest_within(search, meter, bound, aim, ground.progress)
    return ground.costs.narrowed(least)


@dataclass(frozen=True)
class Expected:
    """Seconds that phases are expected to take, by the pace so far.

    Attributes:
        survey: of the layers.
        frontier: of its candidates.
        generation: of the search.
        rest: one finalist, packed and judged.
        cuts: all branches, and one finalist among them.
    """

    survey: float
    frontier: float
    generation: float
    rest: float
    cuts: float

    @classmethod
    def of(cls, ground: Ground, search: FitSearch) -> Expected:
        """By the time of a level, and of measuring it."""
        pace = ground.pace
        each = pace.expected("singles") / len(search.levels)
        made = pace.expected("prune", "round")
        share = min(1.0, SURVEY_TOKENS / search.tokens)
        drawn = ground.recipe.offspring * min(1.0, DRAWN_TOKENS / search.tokens)
        rest = made + MEASURED_AT_THE_END * each
        return cls(
            survey=len(ground.target.layers) * each * share,
            frontier=2 * FRONTIER * each,
            generation=(drawn + 2) * each,
            rest=rest,
            cuts=len(BRANCHES) * (pace.expected("prune") + each) + rest,
        )


def within_loss(
    ground: Ground,
    search: FitSearch,
    measured: tuple[Sequence[Point], Sequence[Point]],
    first: tuple[list[Finalist], list[FitBranch]],
    costs: Costs,
) -> tuple[list[Finalist], list[FitBranch], Costs]:
    """Search again, for a larger model, while the best finalist loses more than its bound.

    The search only estimates the loss, without the embeddings. So the packed model is measured on
    the windows that choose. If its rise and the standard error exceed the bound, the next search
    has a bound that is lower by the excess.

    Args:
        ground: of the fit.
        search: after the survey.
        measured: every level alone, and the frontier.
        first: finalists and branches of the first search.
        costs: its bounds.

    Returns:
        Finalists, branches and bounds of the last search.
    """
    bound = aim = ground.recipe.max_loss_increase
    contest, branches = first
    if bound is None or aim is None or not search.is_surveyed:
        return contest, branches, costs
    for _ in range(MOST):
        if not contest:
            break
        excess = ground.choosing.increase(best_of(contest).packed).cautious - bound
        if excess <= 0 or aim <= 0:
            break
        aim = max(aim - excess, 0.0)
        larger = costs_within(ground, search, aim)
        if larger.kinds[0].limit <= costs.kinds[0].limit:
            break
        costs = larger
        contest, branches = contested(ground, search, *measured, costs)
    return contest, branches, costs


def contested(
    ground: Ground,
    search: FitSearch,
    singles: Sequence[Point],
    frontier: Sequence[Point],
    costs: Costs,
) -> tuple[list[Finalist], list[FitBranch]]:
    """Search within budgets, and make the finalists that keep them.

    Args:
        ground: of the fit.
        search: after the survey; without it, only single levels take part.
        singles: every level alone.
        frontier: further measured candidates; may be empty.
        costs: the bounds.
    """
    whole = cut_windows(ground.searched, ground.searched.numel())
    measure = Yardstick(ground, whole, "searched")
    knapsack = finer_knapsack(ground, search)
    found = refined(ground, search, knapsack, [*singles, *frontier], costs, measure)
    alone = single(ground, search, singles, costs.budget, measure)
    most = costs.kinds[0].limit
    contest = [one for one in (alone, *found) if one is not None and one.told.file_bytes <= most]
    cuts = Expected.of(ground, search).cuts
    if not ground.recipe.structure or not contest or not ground.pace.allows("cuts", cuts):
        return contest, []
    best = best_of(contest)
    grown, branches = branched(ground, search.names, knapsack, best, costs, measure)
    return [*contest, *grown], branches


def refined(
    ground: Ground,
    search: FitSearch,
    knapsack: Knapsack,
    points: Sequence[Point],
    costs: Costs,
    measure: Yardstick,
) -> list[Finalist]:
    """Search from the best points, and make what was found; nothing without a survey."""
    if not search.is_surveyed:
        return []
    inside, times = costs.aim, Expected.of(ground, search)
    quantized = search.knapsack.best(inside, search.allowed("quantize"))
    starts = [p.candidate for p in points if fits(p.cost, inside)]
    starts += [c for c in (search.knapsack.best(inside), quantized) if c is not None]
    starts += search.between(inside)
    if not starts:
        return []

    def go_on() -> bool:
        return ground.pace.allows("generations of the search", times.generation + times.rest)

    winner = search.refined(starts, inside, lambda n: evolution_of(ground.recipe, n), go_on)
    chosen = mixes(search, knapsack, winner, inside)
    return finalists(ground, search, knapsack, chosen, measure, times.rest)


def evolution_of(recipe: FitRecipe, tokens: int) -> Evolution:
    """The parameters of the search on so many tokens."""
    return Evolution(
        generations=recipe.generations,
        offspring=recipe.offspring,
        stages=((2, min(DRAWN_TOKENS, tokens)), (1, tokens)),
        seed=recipe.calibration.seed,
        tries=4,
        revisits=False,
    )


def best_of(contest: Sequence[Finalist]) -> Finalist:
    """The finalist that diverges least from the dense model."""
    return min(contest, key=lambda one: one.told.divergence)


def corrected_contest(
    ground: Ground,
    folder: RunFolder,
    search: FitSearch,
    measured: tuple[Sequence[Point], Sequence[Point]],
    contest: list[Finalist],
    costs: Costs,
    begun: float,
) -> tuple[list[Finalist], CompressResult, list[FitCorrection]]:
    """Pack the best finalist, and search again while it decodes more slowly than its bound.

    Args:
        ground: of the fit.
        folder: of the run, opened.
        search: after the survey.
        measured: every level alone, and the frontier.
        contest: the finalists of the first search.
        costs: its bounds.
        begun: when the run began.

    Returns:
        The finalists of the last search, the report of its packed winner, and every correction.
    """
    packed = pack_winner(folder, ground, best_of(contest), begun)
    uncut = replace(ground, recipe=ground.recipe.model_copy(update={"structure": False}))
    corrections: list[FitCorrection] = []
    speed = timed(ground, folder.model, 0)
    while speed is not None and misses(ground, speed) and len(corrections) < MOST:
        predicted = predicted_speedup(ground, costs, best_of(contest))
        tighter = tightened(ground, costs, speed / predicted)
        again = contested(uncut, search, *measured, tighter)[0] if tighter else []
        if tighter is None or not again:
            break
        packed_again = pack_winner(folder, ground, best_of(again), begun)
        reached = timed(ground, folder.model, len(corrections) + 1)
        corrections.append(FitCorrection(predicted, speed, tighter.speedup, reached))
        if not is_faster(reached, speed):  # it has lost more, and for nothing
            packed = pack_winner(folder, ground, best_of(contest), begun)
            break
        contest, costs, packed, speed = again, tighter, packed_again, reached
    return contest, packed, corrections


def timed(ground: Ground, made: Path, number: int) -> float | None:
    """The speed-up of a packed winner, from the file of an earlier run or timed now.

    Args:
        ground: of the fit.
        made: its folder.
        number: of the winner, from 0.

    Returns:
        None if it is not bounded, or cannot be measured.
    """
    if ground.recipe.decode_speedup is None:
        return None
    file = ground.work / f"speedup-{number}.json"
    if not file.exists():
        write_json(file, {"speedup": speedup_of(ground, made)})
    found: float | None = json.loads(file.read_text(encoding="utf-8"))["speedup"]
    return found


def misses(ground: Ground, speedup: float) -> bool:
    """Whether a measured speed-up is less than the bound, by more than the error of timing."""
    wanted = ground.recipe.decode_speedup
    return wanted is not None and speedup < wanted * (1 - TIMING_ERROR)


def is_faster(speedup: float | None, before: float) -> bool:
    """Whether a speed-up is more than another one, by more than the error of timing."""
    return speedup is not None and speedup > before * (1 + TIMING_ERROR)


def predicted_speedup(ground: Ground, costs: Costs, winner: Finalist) -> float:
    """The speed-up that the table of times predicts for a winner; the bound for a cut one."""
    assert costs.times is not None
    if winner.cut:
        return float(ground.recipe.decode_speedup or 1.0)
    linears = sum(costs.seconds(costs.shapes[name], kind) for name, kind in winner.kinds.items())
    return costs.times.base / (costs.times.rest + linears)


def tightened(ground: Ground, costs: Costs, ratio: float) -> Costs | None:
    """Bounds that make up for what the table promises too much.

    Args:
        ground: of the fit.
        costs: the bounds of the last search.
        ratio: measured by predicted speed-up of its winner.

    Returns:
        None if the last search had no room left either.
    """
    wanted, place = ground.recipe.decode_speedup, costs.place(SECONDS)
    assert wanted is not None
    assert place is not None
    assert costs.times is not None
    seconds, least = costs.kinds[place], costs.least(place)
    if least is None or least > seconds.limit * (1 - TIMING_ERROR / 5):
        return None
    return costs.limited(place, max(min(seconds.limit, costs.times.base / wanted * ratio), least))


def pack_winner(
    folder: RunFolder, ground: Ground, winner: Finalist, begun: float
) -> CompressResult:
    """Pack the winner into the folder of the run, with its recipe.

    Args:
        folder: of the run, opened.
        ground: of the fit.
        winner: what is packed.
        begun: when the run began, for the record.
    """
    recipe = ground.recipe
    text = f"{recipe.output}/{NOTES}/{WINDOWS}"
    steps = steps_of(recipe, winner.kinds, text)
    if winner.cut:
        [[verb, given]] = winner.cut.items()
        steps.insert(0, {verb: {**given, "calibration": {"source": text}}})
    ends = {"model": recipe.model, "output": recipe.output}
    rounding = rounding_record(winner.folder) if "calibration" in steps[-1]["compress"] else {}
    if rounding:
        rounding["calibration"] = {**rounding["calibration"], "source": text}
    chosen = chosen_values(recipe, winner.folder, winner.kinds, rounding)
    source = replace(ground.source, folder=winner.sparse)
    compress = packing_recipe(recipe, winner.kinds)
    report = pack_into(folder, compress, source, chosen, ground.progress, begun)
    shutil.copyfile(ground.fitted, folder.notes / WINDOWS)
    if winner.cut:
        shutil.copytree(winner.base / NOTES, folder.notes / "steps" / "structure")
    chain = {
        **ends,
        "output": f"{recipe.output}-again",
        "steps": steps,
        "trust_remote_code": recipe.trust_remote_code,
    }
    write_text(folder.notes / RECIPE, dump_recipe(build_recipe(ChainRecipe, chain)))
    places = {str(ground.fitted): text}
    places |= {str(one): str(recipe.output) for one in (winner.sparse, winner.folder, winner.base)
               if one != ground.reader.folder}  # fmt: skip
    name_the_result(folder, places)
    return report


def name_the_result(folder: RunFolder, places: Mapping[str, str]) -> None:
    """Replace places among the work of the run by those of the result, in the card and notes."""
    notes = [file for file in folder.notes.rglob("*") if file.suffix in (".json", ".yaml")]
    for file in (folder.model / "README.md", *notes):
        text = file.read_text(encoding="utf-8")
        for work, result in places.items():
            text = text.replace(work, result)
        write_text(file, text)


def judged(
    ground: Ground, made: Path, winner: Finalist, contest: Sequence[Finalist]
) -> dict[str, FitLoss]:
    """The loss of the winner and its rivals, as they run, on text that neither made nor chose them.

    Args:
        ground: of the fit.
        made: the packed winner.
        winner: the same before packing.
        contest: the winner and its rivals.
    """
    rounded = [one for one in contest if one.only_rounded]
    rivals = {
        WINNER: winner,
        SINGLE: next((one for one in contest if one.told.name == SINGLE), None),
        ONLY_ROUNDED: min(rounded, key=lambda one: one.told.divergence, default=None),
    }
    found = {}
    for name, one in rivals.items():
        if one is not None:
            folder = made if one is winner else one.packed
            rise = ground.judging.increase(folder)
            found[name] = FitLoss(one.told.file_bytes, rise.mean, rise.standard_error)
    return found


def told_costs(costs: Costs) -> tuple[FitCost, ...]:
    """The kinds of cost, for the result."""
    return tuple(
        FitCost(kind.name, kind.rest, kind.limit if math.isfinite(kind.limit) else None)
        for kind in costs.kinds
    )
