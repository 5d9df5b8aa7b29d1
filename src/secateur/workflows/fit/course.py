"""The course of a fit: levels, search, the winner packed, and what was made measured."""

from __future__ import annotations

import time

from secateur.engine.choose.fitting import FitSearch, Point
from secateur.recipes.fit import FitRecipe, bytes_of
from secateur.reporting.results.fit import FitLoss, FitResult
from secateur.runs.folder import RunFolder
from secateur.sparsity.evolution import Candidate, Evolution
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import PROBE
from secateur.workflows.fit.levels import made_levels
from secateur.workflows.fit.loss_meter import LossMeter, smallest_within
from secateur.workflows.fit.packing import pack_winner

__all__ = ["carry_out", "evolution_of", "new_search", "single_within"]

DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""


def carry_out(ground: Ground, folder: RunFolder, rest: int, begun: float) -> FitResult:
    """Make levels, search, pack and judge.

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
    quantized = search.menu.best(budget, search.allowed("quantize"))
    starts = [p.candidate for p in (*singles, *frontier) if p.cost <= budget]
    starts += [c for c in (search.menu.best(budget), quantized) if c is not None]
    starts += search.between(budget)
    winner = search.refined(starts, budget, lambda tokens: evolution_of(recipe, tokens))
    meter = LossMeter.on(
        ground.judged, ground, search.names, search.levels, ground.work / "judged.jsonl"
    )
    judged = {
        "winner": winner.candidate,
        "the best single technique": single_within(singles, budget),
        "quantize only, mixed": quantized,
    }
    losses = {
        name: FitLoss(search.menu.total(candidate), meter.rise(candidate))
        for name, candidate in judged.items()
        if candidate is not None
    }
    level_of = dict(zip(search.names, winner.candidate, strict=True))
    packed = pack_winner(folder, ground, search.levels, level_of, begun)
    return FitResult(
        folder.output,
        None if recipe.max_size is None else bytes_of(recipe.max_size),
        recipe.max_loss_increase,
        tuple(one.name for one in search.levels),
        level_of,
        winner,
        tuple(singles),
        tuple(frontier),
        losses,
        rest,
        packed,
        time.perf_counter() - begun,
    )


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


def single_within(singles: list[Point], budget: float) -> Candidate | None:
    """The best single level within a budget."""
    fitting = [point for point in singles if point.cost <= budget]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    return None if best is None else best.candidate
