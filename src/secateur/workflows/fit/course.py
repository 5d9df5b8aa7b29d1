"""The course of a fit: levels, search, finalists, the winner packed, and what was made measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

from secateur.engine.choose.fitting import FitSearch, Point
from secateur.engine.choose.tournament import cut_windows
from secateur.recipes.fit import FitRecipe, bytes_of
from secateur.reporting.results.fit import (
    ONLY_ROUNDED,
    WINNER,
    FitBranch,
    FitLoss,
    FitResult,
)
from secateur.runs.folder import RunFolder
from secateur.sparsity.evolution import Evolution
from secateur.workflows.fit.bounds import MARGIN
from secateur.workflows.fit.branches import branched
from secateur.workflows.fit.finalists import (
    SINGLE,
    Finalist,
    finalists,
    mixes,
    single,
)
from secateur.workflows.fit.finer import finer_menu
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import PROBE
from secateur.workflows.fit.levels import made_levels
from secateur.workflows.fit.loss_meter import LossMeter, smallest_within
from secateur.workflows.fit.packing import pack_winner
from secateur.workflows.fit.yardstick import Yardstick

__all__ = ["carry_out", "contested", "evolution_of", "new_search"]

DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""


def carry_out(ground: Ground, folder: RunFolder, rest: int, begun: float) -> FitResult:
    """Make levels, search, make the finalists, pack the best one and judge it.

    Args:
        ground: of the fit.
        folder: of the run, opened.
        rest: bytes of everything that is no linear.
        begun: when the run began.
    """
    recipe = ground.recipe
    search = new_search(ground)
    singles = search.singles()
    search.survey(PROBE)
    budgets = search.budgets()
    frontier = search.frontier(budgets, "all") + search.frontier(budgets, "quantize")
    budget = budget_of(ground, search, rest)
    contest, branches = contested(ground, search, singles, frontier, rest, budget)
    winner = min(contest, key=lambda one: one.told.divergence)
    packed = pack_winner(folder, ground, winner, begun)
    return FitResult(
        output=folder.output,
        max_bytes=None if recipe.max_size is None else bytes_of(recipe.max_size),
        max_loss_increase=recipe.max_loss_increase,
        kind_of={name: kind.name for name, kind in winner.kinds.items()},
        winner=winner.told,
        finalists=tuple(one.told for one in contest),
        branches=tuple(branches),
        singles=tuple(singles),
        frontier=tuple(frontier),
        losses=judged(ground, winner, contest),
        rest=rest,
        packed=packed,
        seconds=time.perf_counter() - begun,
    )


def contested(
    ground: Ground,
    search: FitSearch,
    singles: Sequence[Point],
    frontier: Sequence[Point],
    rest: int,
    budget: float,
) -> tuple[list[Finalist], list[FitBranch]]:
    """Search within a budget, and make the finalists that keep it.

    Args:
        ground: of the fit.
        search: after the survey.
        singles: every level alone.
        frontier: further measured candidates; may be empty.
        rest: bytes of everything that is no linear.
        budget: bytes of all linears.
    """
    inside, menu = budget * (1 - MARGIN), finer_menu(ground, search)
    quantized = search.menu.best(inside, search.allowed("quantize"))
    starts = [p.candidate for p in (*singles, *frontier) if p.cost <= inside]
    starts += [c for c in (search.menu.best(inside), quantized) if c is not None]
    starts += search.between(inside)
    whole = cut_windows(ground.searched, ground.searched.numel())
    measure = Yardstick(ground, whole, "searched")
    found: list[Finalist] = []
    if starts:
        winner = search.refined(starts, inside, lambda n: evolution_of(ground.recipe, n))
        chosen = mixes(search, menu, winner, inside)
        found = finalists(ground, search, menu, chosen, rest, measure)
    alone = single(ground, search, singles, rest, budget)
    most = rest + budget
    contest = [one for one in (alone, *found) if one is not None and one.told.file_bytes <= most]
    if not ground.recipe.structure or not contest:
        return contest, []
    best = min(contest, key=lambda one: one.told.divergence)
    grown, branches = branched(ground, search.names, menu, best, most, measure)
    return [*contest, *grown], branches


def judged(ground: Ground, winner: Finalist, contest: Sequence[Finalist]) -> dict[str, FitLoss]:
    """The loss of the winner and its rivals on text that neither made nor chose them."""
    measure = Yardstick(ground, ground.judged, "judged")
    rounded = [one for one in contest if one.only_rounded]
    rivals = {
        WINNER: winner,
        SINGLE: next((one for one in contest if one.told.name == SINGLE), None),
        ONLY_ROUNDED: min(rounded, key=lambda one: one.told.divergence, default=None),
    }
    return {
        name: FitLoss(one.told.file_bytes, measure.rise(one.folder))
        for name, one in rivals.items()
        if one is not None
    }


def new_search(ground: Ground) -> FitSearch:
    """A search among the levels, which are made now; costs are bytes."""
    levels = list(made_levels(ground))
    costs = {n: [float(one.level.bytes_of[n]) for one in levels] for n in ground.stored}
    file = ground.work / "search.jsonl"
    return FitSearch(ground.target, levels, costs, ground.searched, file, ground.progress)


def budget_of(ground: Ground, search: FitSearch, rest: int) -> float:
    """The bytes that all linears may have, after the survey."""
    recipe = ground.recipe
    size = None if recipe.max_size is None else bytes_of(recipe.max_size)
    budget = float("inf") if size is None else float(size - rest)
    if recipe.max_loss_increase is None:
        return budget
    file = ground.work / "losses.jsonl"
    meter = LossMeter.on(ground.searched, ground, search.names, search.levels, file)
    least = smallest_within(search, meter, recipe.max_loss_increase, ground.progress)
    return min(budget, least)


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
