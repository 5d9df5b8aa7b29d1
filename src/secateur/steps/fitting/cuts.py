"""A fit that may cut: all units in few bits, or fewer of them in more.

| lever   | what goes                                                                  |
|---------|----------------------------------------------------------------------------|
| experts | those that cost least, of the whole model; for llama.cpp as many of each layer |
| neurons | of every FFN, and of every expert, the same share                          |
| both    |                                                                            |

A cut leaves more bytes to what stays. The survey of a fit says what experts and neurons add to the
divergence when they go (`structured.choices.CutLosses`), in the same nats as what rounding adds. So
the knapsack chooses formats for every cut, and both predictions are added up. The best cuts are
made as `secateur structure` makes them, and tuned; their mixes compete with the mix of the whole
model as real models.

What a linear loses by rounding falls with its neurons. It does not fall with fewer experts, because
each token still passes as many of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.skeleton import build_skeleton, text_part
from secateur.reporting.tables import layer_of
from secateur.runs.output import write_json
from secateur.steps.fitting.bench import BuiltCandidate, FitBench
from secateur.steps.fitting.problem import Costs, FitProblem
from secateur.structured.choices import expert_counts, readers_of
from secateur.structured.cut import NEURONS, consumers, sizes_of
from secateur.structured.cut_plan import CutPlan, counts_left, width_shares

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Of the experts of a layer, and of the neurons, that may stay."""

MADE = 3
"""Cuts that are made, at most."""


@dataclass(frozen=True)
class FitCut:
    """A cut that a fit may make.

    Attributes:
        experts: those that stay, by number of the layer; None for all.
        neurons: the share of neurons that stays.
        lost: what the survey says that it adds to the divergence.
    """

    experts: Mapping[int, Sequence[int]] | None = None
    neurons: float = 1.0
    lost: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        parts = [f"{self.neurons:.1%} of the neurons"] if self.neurons < 1 else []
        if self.experts is not None:
            counts = [*map(len, self.experts.values())]
            mean = f"{sum(counts) / len(counts):g} experts"
            parts.insert(0, mean if len({*counts}) == 1 else f"{mean} on average")
        return ", ".join(parts)

    def options(self, folder: Path) -> dict[str, Any]:
        """The options of `structure` that make it; a list of experts lies in a folder."""
        found: dict[str, Any] = {"ffn": self.neurons} if self.neurons < 1 else {}
        if self.experts is not None:
            file = folder / f"{self.name.replace(' ', '-')}.json"
            folder.mkdir(exist_ok=True)
            write_json(file, {str(layer): [*kept] for layer, kept in self.experts.items()})
            found["experts_list"] = str(file)
        return found

    def shapes(self, costs: Costs, model: Any) -> dict[str, tuple[int, int]]:
        """The shapes of the linears that it leaves, by their names in the whole model."""
        architecture, sizes, readers = describe(model), sizes_of(model), consumers(model)
        plan, experts = CutPlan(sizes, neurons=1 - self.neurons), architecture.experts
        left = counts_left(plan, model, 1) if self.neurons < 1 else {}
        found = {}
        for name, (rows, columns) in costs.shapes.items():
            layer, place = layer_of(name), experts and experts.place_of(name)
            if place and self.experts is not None and int(place[1]) not in self.experts[layer]:
                continue
            inner = name.removeprefix(f"{architecture.layer_name(layer)}.")
            for kind in (kind for kind, counts in left.items() if layer in counts):
                there, now = getattr(sizes, kind)[layer], left[kind][layer]
                if fnmatchcase(inner, readers[kind]):
                    columns = columns * now // there
                elif fnmatchcase(*(x.rpartition(".")[0] for x in (inner, readers[kind]))):
                    rows = rows * now // there  # it makes the neurons
            found[name] = rows, columns
        return found

    def problem(self, whole: FitProblem, model: Any) -> FitProblem:
        """The choice of formats for what it leaves, by the names of the whole model."""
        costs, losses, experts = whole.costs, whole.losses, describe(model).experts
        shapes = self.shapes(costs, model)

        def factor(name: str) -> float:
            if name not in shapes:
                return 1.0
            share = math.prod(shapes[name]) / math.prod(costs.shapes[name])
            if self.experts is None or experts is None or experts.place_of(name) is None:
                return share
            layer = layer_of(name)
            return share * sizes[layer] / len(self.experts[layer])

        sizes = sizes_of(model).experts
        rounded, pruned = (
            {name: lost * factor(name) for name, lost in part.items()}
            for part in (losses.rounded, losses.pruned)
        )
        losses = replace(losses, rounded=rounded, pruned=pruned)
        return replace(whole, costs=replace(costs, shapes=shapes), losses=losses)


def costs_of_fewest(costs: Costs, folder: Path) -> Costs:
    """The costs with the smallest cut that a fit tries.

    Raises:
        ArchitectureError: nothing of the model can go.
    """
    model = build_skeleton(folder)
    counts, shares = expert_counts(model, SHARES), _shares(costs, model)
    if not counts and len(shares) == 1:
        raise ArchitectureError(
            "the model has no experts and no neurons that can go"
            if costs.times is None
            else "the model has no experts that can go, and with neurons no speed is predicted",
            where="--structure",
            remedy="leave it out",
        )
    experts = dict.fromkeys(range(sizes_of(model).layers), range(counts[0])) if counts else None
    return replace(costs, shapes=FitCut(experts, min(shares)).shapes(costs, model))


def with_cuts(
    bench: FitBench, made: list[BuiltCandidate], problem: FitProblem
) -> tuple[FitBench, list[BuiltCandidate], FitProblem]:
    """Also make the mixes of the cuts that are predicted to diverge less.

    Args:
        bench: of the whole model.
        made: the candidates so far.
        problem: after they were made.

    Returns:
        The bench of the best model, all candidates, and its problem.
    """
    best = min((one.row.divergence for one in made), default=math.inf)
    winner, every, scale = (bench, problem), [*made], 1.0
    left = [*_predicted(bench, problem)]
    for _ in range(MADE):
        rise, cut, own = min(
            left, key=lambda one: one[0] + scale * one[1].lost, default=(best, FitCut(), problem)
        )
        if rise + scale * cut.lost >= best or not bench.time.allows("a cut", "making"):
            break
        left = [one for one in left if one[1] is not cut]
        other = bench.of_cut(cut.name, cut.options(bench.work / "cuts"))
        base = bench.chosen.of(bench.opened(other.model.reader), cut.name)
        scale = base / cut.lost if cut.lost > 0 else scale
        own = replace(_renamed(own, other, cut), base=base)
        built, after = other.mix(f"the mix, {cut.name}", own)
        if built is not None:
            every.append(built)
            if built.row.divergence < best:
                best, winner = built.row.divergence, (other, after)
    return winner[0], every, winner[1]


def _predicted(bench: FitBench, problem: FitProblem) -> Iterator[tuple[float, FitCut, FitProblem]]:
    """The cuts that fit, each with what its best formats are predicted to lose, and its problem."""
    model, losses = bench.target.model, problem.losses.cuts
    experts, couplings = describe(model).experts, describe(model).couplings
    kept: list[Mapping[int, Sequence[int]] | None] = [None]
    if experts is not None and losses.experts:
        alike = bench.recipe.target == "llama.cpp" or text_part(model.config) is not None
        scope = "layer" if alike or couplings is None or couplings.alike else "global"
        kept += [losses.best(n, experts, model.config, scope) for n in expert_counts(model, SHARES)]
    for own, (share, gone) in product(kept, _shares(problem.costs, model).items()):
        lost = losses.of_shares(gone, model) + (losses.of_experts(own) if own else 0.0)
        cut = FitCut(own, share, lost)
        if cut.name:
            fewer = cut.problem(problem, model)
            candidate = fewer.knapsack.best(fewer.costs.aim)
            if candidate is not None:
                yield fewer.knapsack.predicted(candidate), cut, fewer


def _shares(costs: Costs, model: Any) -> dict[float, dict[str, float]]:
    """The shares of neurons that may stay, largest first, and what goes of each kind of them.

    Experts keep whole multiples. Seconds are predicted for matrices of the whole model alone, so
    with a bound on them all neurons stay.
    """
    found, sizes = dict[float, dict[str, float]]({1.0: {}}), sizes_of(model)
    if costs.times is None and readers_of(model, NEURONS):
        for share in SHARES:
            gone = width_shares(CutPlan(sizes, neurons=1 - share), sizes, model, 1)
            found.setdefault(1 - max(gone.values()), gone)
    return found


def _renamed(problem: FitProblem, bench: FitBench, cut: FitCut) -> FitProblem:
    """The same for a cut that was made: its linears have the names of the smaller model."""
    experts = bench.target.architecture.experts

    def before(name: str) -> str:
        place = experts and experts.place_of(name)
        if not place or cut.experts is None:
            return name
        was = cut.experts[layer_of(name)][int(place[1])]
        return f"{name[: place.start(1)]}{was}{name[place.end(1) :]}"

    losses, names = problem.losses, [n for unit in bench.costs.members.values() for n in unit]
    own = {name: before(name) for name in names}
    parts: dict[str, Any] = {
        part: {n: x[was] for n, was in own.items() if was in x}
        for part in ("rounded", "pruned", "coarser", "kept")
        for x in [getattr(losses, part)]
    }
    return replace(problem, costs=bench.costs, losses=replace(losses, **parts))
