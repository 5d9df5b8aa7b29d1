"""The course of a fit: levels, search, finalists, the winner packed, and what was made measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.engine.choose.budgeted import Menu, fits
from secateur.engine.choose.fitting import FRONTIER, SURVEY_TOKENS, FitSearch, Point
from secateur.engine.choose.tournament import cut_windows
from secateur.errors import VerificationError
from secateur.evaluation.tasks import PreparedTask
from secateur.recipes.fit import FitRecipe
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
from secateur.runs.folder import RunFolder
from secateur.sparsity.evolution import Evolution
from secateur.workflows.fit.branches import BRANCHES, branched
from secateur.workflows.fit.correction import (
    MOST,
    is_faster,
    misses,
    predicted_speedup,
    tightened,
    timed,
)
from secateur.workflows.fit.costs import Costs
from secateur.workflows.fit.finalists import SINGLE, Finalist, finalists, mixes, single
from secateur.workflows.fit.finer import finer_menu
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import probe_of
from secateur.workflows.fit.levels import made_levels
from secateur.workflows.fit.loss_meter import LossMeter, smallest_within
from secateur.workflows.fit.packing import pack_winner
from secateur.workflows.fit.verify import checks_of
from secateur.workflows.fit.yardstick import Yardstick

MEASURED_AT_THE_END = 8
"""What packing and judging the winner and its rivals take, in measurements of one candidate."""

DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""


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


def best_of(contest: Sequence[Finalist]) -> Finalist:
    """The finalist that diverges least from the dense model."""
    return min(contest, key=lambda one: one.told.divergence)


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
    menu = finer_menu(ground, search)
    found = refined(ground, search, menu, [*singles, *frontier], costs, measure)
    alone = single(ground, search, singles, costs.budget, measure)
    most = costs.kinds[0].limit
    contest = [one for one in (alone, *found) if one is not None and one.told.file_bytes <= most]
    cuts = Expected.of(ground, search).cuts
    if not ground.recipe.structure or not contest or not ground.pace.allows("cuts", cuts):
        return contest, []
    best = best_of(contest)
    grown, branches = branched(ground, search.names, menu, best, costs, measure)
    return [*contest, *grown], branches


def refined(
    ground: Ground,
    search: FitSearch,
    menu: Menu,
    points: Sequence[Point],
    costs: Costs,
    measure: Yardstick,
) -> list[Finalist]:
    """Search from the best points, and make what was found; nothing without a survey."""
    if not search.is_surveyed:
        return []
    inside, times = costs.aim, Expected.of(ground, search)
    quantized = search.menu.best(inside, search.allowed("quantize"))
    starts = [p.candidate for p in points if fits(p.cost, inside)]
    starts += [c for c in (search.menu.best(inside), quantized) if c is not None]
    starts += search.between(inside)
    if not starts:
        return []

    def go_on() -> bool:
        return ground.pace.allows("generations of the search", times.generation + times.rest)

    winner = search.refined(starts, inside, lambda n: evolution_of(ground.recipe, n), go_on)
    chosen = mixes(search, menu, winner, inside)
    return finalists(ground, search, menu, chosen, measure, times.rest)


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


def costs_within(ground: Ground, search: FitSearch, bound: float | None) -> Costs:
    """The bounds after the survey: with a bound on the loss, the smallest size within it."""
    if bound is None:
        return ground.costs
    file = ground.work / "losses.jsonl"
    meter = LossMeter.on(ground.searched, ground, search.names, search.levels, file)
    aim = ground.costs.aim
    least = smallest_within(search, meter, bound, aim, ground.progress)
    return ground.costs.narrowed(least)


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
