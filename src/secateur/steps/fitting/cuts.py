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
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.calibration.windows import load_windows
from secateur.engine.search.expert_divergence import divergence_scores
from secateur.engine.search.experts import best_experts
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.skeleton import build_skeleton
from secateur.runs.folder import NOTES
from secateur.steps.fitting.bench import BuiltCandidate, FitBench
from secateur.steps.fitting.problem import Costs, FitProblem, UnitLosses
from secateur.structured.cut import sizes_of

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Of the experts of a layer, that may stay."""

_EXPERT = re.compile(
    r"(?P<before>.*\.(?P<layer>\d+)\.(?:.*\.)?experts\.)(?P<expert>\d+)(?P<after>\..*)"
)
"""The name of a linear of an expert."""

Experts = Mapping[int, tuple[int, ...]]
"""Numbers of experts, by layer."""


def costs_of_fewest(costs: Costs, folder: Path) -> Costs:
    """The costs with the fewest experts that a fit tries.

    Raises:
        ArchitectureError: the model has no experts, or none can go.
    """
    counts = _counts(build_skeleton(folder))
    kept = dict.fromkeys(range(len(costs.shapes)), tuple(range(counts[0])))
    return _costs_with(costs, kept)


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
    chosen, groups = experts.per_token(model.config) or 1, experts.divided(model.config)
    for count in _counts(model):
        kept = best_experts(scores, count, chosen, groups=groups)
        lost = sum(float(own.sum() - own[list(kept[n])].sum()) for n, own in scores.items())
        fewer = replace(problem, costs=_costs_with(problem.costs, kept))
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
        fewest = min(filter(None, sizes_of(model).experts), default=0)
        least, groups = experts.per_token(model.config) or 1, experts.divided(model.config)
        tried = {round(fewest * share) for share in SHARES}
        found = [x for x in sorted(tried) if least <= x < fewest and not x % groups]
    if not found:
        raise ArchitectureError(
            "the model has no experts that can go", where="--structure", remedy="leave it out"
        )
    return found


def _costs_with(costs: Costs, kept: Experts) -> Costs:
    """The costs of a model without the linears of other experts."""

    def stays(linear: str) -> bool:
        match = _EXPERT.fullmatch(linear)
        return match is None or int(match["expert"]) in kept[int(match["layer"])]

    return replace(costs, shapes={name: x for name, x in costs.shapes.items() if stays(name)})


def _problem_of(bench: FitBench, problem: FitProblem) -> FitProblem:
    """The same for a cut: what its linears lose is what they lose in the whole model."""
    steps = json.loads((bench.source.folder / NOTES / "steps.json").read_text(encoding="utf-8"))
    kept = next(step["cut"]["experts"] for step in steps if step["step"] == "experts")

    def before(match: re.Match[str]) -> str:
        return f"{match['before']}{kept[match['layer']][int(match['expert'])]}{match['after']}"

    losses, names = problem.losses, [n for unit in bench.costs.members.values() for n in unit]
    own = {name: _EXPERT.sub(before, name) for name in names}
    parts = {
        part: {n: x[was] for n, was in own.items() if was in x}
        for part in ("rounded", "pruned", "coarser", "kept")
        for x in [getattr(losses, part)]
    }
    return replace(
        problem, costs=bench.costs, losses=UnitLosses(**parts, embeddings=losses.embeddings)
    )
