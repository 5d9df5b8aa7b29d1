"""A fit that may remove experts: all of them in few bits, or fewer of them in more.

Fewer experts leave more bytes to those that stay. What their removal adds to the divergence is
predicted in the same nats as what rounding adds (`engine.search.expert_divergence`). So the
knapsack chooses formats for each number of experts, and both predictions are added up. The best
number is made as `secateur structure --experts` makes it, with its routers tuned, and its mix
competes with the mix of all experts as a real model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.calibration.windows import load_windows
from secateur.engine.search.expert_divergence import divergence_scores
from secateur.engine.search.experts import best_experts
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.skeleton import build_skeleton
from secateur.reporting.tables import layer_of
from secateur.runs.folder import NOTES
from secateur.steps.fitting.bench import BuiltCandidate, FitBench
from secateur.steps.fitting.problem import Costs, FitProblem, UnitLosses
from secateur.structured.cut import sizes_of

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Of the experts of a layer, that may stay."""


def costs_of_fewest(costs: Costs, folder: Path) -> Costs:
    """The costs with the fewest experts that a fit tries.

    Raises:
        ArchitectureError: the model has no experts, or none can go.
    """
    model = build_skeleton(folder)
    fewest = range(_counts(model)[0])
    return _costs_with(costs, model, dict.fromkeys(range(sizes_of(model).layers), fewest))


def with_fewer_experts(
    bench: FitBench, made: list[BuiltCandidate], problem: FitProblem
) -> tuple[FitBench, list[BuiltCandidate], FitProblem]:
    """Also make the mix with the best number of experts, if it is predicted to diverge less.

    Args:
        bench: of the whole model.
        made: the candidates so far.
        problem: after they were made.

    Returns:
        The bench of the better model, all candidates, and its problem.
    """
    best = min((one.row.divergence for one in made), default=math.inf)
    predicted, count = min(_predicted(bench, problem), default=(best, 0))
    if predicted >= best or not bench.time.allows("fewer experts", "making"):
        return bench, made, problem
    name = f"{count} experts"
    other = bench.of_cut(name, {"experts": count, "experts_by": "divergence"})
    base = bench.chosen.of(bench.opened(other.model.reader), name)
    own = replace(_problem_of(other, problem), base=base)
    built, after = other.mix(f"the mix, {name}", own)
    if built is None:
        return bench, made, problem
    every = [*made, built]
    return (other, every, after) if built.row.divergence < best else (bench, every, problem)


def _predicted(bench: FitBench, problem: FitProblem) -> Iterator[tuple[float, int]]:
    """The predicted divergence with each number of experts that can stay and fits."""
    model, windows = bench.target.model, load_windows(bench.windows_file)
    scores = divergence_scores(bench.target, windows, bench.work / "experts", bench.progress)
    experts: Any = bench.target.architecture.experts
    fewest, groups = experts.fewest(model.config), experts.divided(model.config)
    for count in _counts(model):
        kept = best_experts(scores, count, fewest, groups=groups)
        lost = sum(float(own.sum() - own[list(kept[n])].sum()) for n, own in scores.items())
        fewer = replace(problem, costs=_costs_with(problem.costs, model, kept))
        candidate = fewer.knapsack.best(fewer.costs.aim)
        if candidate is not None:
            yield lost + fewer.knapsack.predicted(candidate), count


def _counts(model: Any) -> list[int]:
    """How many experts may stay in each layer, ascending.

    Args:
        model: its skeleton is enough.

    Raises:
        ArchitectureError: it has no experts, or none can go.
    """
    experts, found = describe(model).experts, list[int]()
    if experts is not None:
        there = min(filter(None, sizes_of(model).experts), default=0)
        fewest, groups = experts.fewest(model.config), experts.divided(model.config)
        tried = {round(there * share) for share in SHARES}
        found = [x for x in sorted(tried) if fewest <= x < there and not x % groups]
    if not found:
        raise ArchitectureError(
            "the model has no experts that can go", where="--structure", remedy="leave it out"
        )
    return found


def _costs_with(costs: Costs, model: Any, kept: Mapping[int, Sequence[int]]) -> Costs:
    """The costs of a model without the linears of other experts than those kept in each layer."""
    experts: Any = describe(model).experts

    def stays(linear: str) -> bool:
        place = experts.place_of(linear)
        return place is None or int(place[1]) in kept[layer_of(linear)]

    return replace(costs, shapes={name: x for name, x in costs.shapes.items() if stays(name)})


def _problem_of(bench: FitBench, problem: FitProblem) -> FitProblem:
    """The same for a cut: what its linears lose is what they lose in the whole model."""
    steps = json.loads((bench.source.folder / NOTES / "steps.json").read_text(encoding="utf-8"))
    kept = next(step["cut"]["experts"] for step in steps if step["step"] == "experts")

    experts: Any = bench.target.architecture.experts

    def before(name: str) -> str:
        place = experts.place_of(name)
        was = place and kept[str(layer_of(name))][int(place[1])]
        return f"{name[: place.start(1)]}{was}{name[place.end(1) :]}" if place else name

    losses, names = problem.losses, [n for unit in bench.costs.members.values() for n in unit]
    own = {name: before(name) for name in names}
    parts = {
        part: {n: x[was] for n, was in own.items() if was in x}
        for part in ("rounded", "pruned", "coarser", "kept")
        for x in [getattr(losses, part)]
    }
    return replace(
        problem, costs=bench.costs, losses=UnitLosses(**parts, embeddings=losses.embeddings)
    )
