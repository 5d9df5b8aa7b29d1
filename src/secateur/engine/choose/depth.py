"""Chooses the decoder layers, or their sub-blocks, that a model can lose.

One decoder layer is in memory at a time. This module does not change the model;
`structured.surgery` removes the chosen units.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.engine.choose.depth_influence import angular_distances, influences
from secateur.engine.choose.depth_space import (
    ATTENTION,
    FFN,
    WHOLE,
    DepthUnit,
    DropSpace,
    Removal,
    greedy,
    lowest,
)
from secateur.engine.choose.sub_blocks import SubBlocks, parameters_of
from secateur.engine.choose.tournament import Lockstep, Tournament, cut_windows, fingerprint
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import Target
from secateur.errors import ArchitectureError, NumericalError, RecipeError
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate, Evolution, Stages, ordered

_UNITS = {
    "layers": (WHOLE,),
    "attention": (ATTENTION,),
    "ffn": (FFN,),
    "blocks": (ATTENTION, FFN),
}
_METHODS = ("influence", "angular", "greedy", "search")
_OBJECTIVES = ("divergence", "loss")
_TRIES = 8


@dataclass(frozen=True)
class DepthSettings:
    """How much depth to remove, and how to choose it.

    Methods:
        influence: the units of least block influence (ShortGPT), per parameter.
        angular: the consecutive layers of least angular distance (Gromov et al.).
        greedy: one unit at a time; each step drops the unit whose removal harms the whole model
            least. With `objective="loss"` and one stage this is SLEB (Song et al. 2024,
            arXiv:2402.09025).
        search: an evolutionary search from the better of influence and greedy. It exchanges dropped
            units for kept ones (EvoPress, Sieberling et al. 2024, arXiv:2410.14649).

    Deviations: greedy removal and search select in stages, with fewer candidates on more tokens.
    SLEB uses the loss and EvoPress the divergence; here both methods can use either. The search
    begins with the result of greedy removal, draws units to drop by the ranking from greedy
    removal, measures no candidate twice, and exchanges units of different size within one budget
    of parameters.

    Args:
        units: `layers`, `attention`, `ffn` (sub-blocks of one kind), or `blocks` (of both).
        count: number of units to drop; not for `blocks`, which differ in size.
        share: minimum fraction of the decoder layers' parameters to drop, without norms, in place
            of `count`.
        method: influence, angular, greedy or search.
        objective: `divergence` from the dense model, or `loss`, of the next tokens.
        stages: (survivors, tokens) of each stage of a selection; the last keeps 1.
        generations: number of generations of the search.
        offspring: number of mutants in a generation.
        seed: seed of the mutations.

    Raises:
        RecipeError: a parameter is out of range, or two parameters contradict each other.
    """

    units: str = "layers"
    count: int | None = None
    share: float | None = None
    method: str = "influence"
    objective: str = "divergence"
    stages: Stages = ((4, 1024), (1, 8192))
    generations: int = 12
    offspring: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("units", self.units, tuple(_UNITS)),
            ("method", self.method, _METHODS),
            ("objective", self.objective, _OBJECTIVES),
        ):
            if value not in known:
                raise RecipeError(f"{name} is {value!r}", remedy=f"give one of {', '.join(known)}")
        if (self.count is None) == (self.share is None):
            raise RecipeError(
                f"count is {self.count} and share is {self.share}",
                remedy="give one of them",
            )
        if (self.count is not None and self.count < 1) or not 0 < (self.share or 0.5) < 1:
            raise RecipeError(
                f"{self.count or self.share} of the depth cannot be dropped",
                remedy="give a count of 1 or more, or a share in (0, 1)",
            )
        if self.units == "blocks" and self.count is not None:
            raise RecipeError(
                f"{self.count} blocks of attention and feed-forward differ in size",
                remedy="give the share of parameters to drop",
            )
        if self.units != "layers" and self.method == "angular":
            raise RecipeError(
                f"angular distance is defined for whole layers, and units are {self.units}",
                remedy="give units: layers, or another method",
            )
        _ = self.evolution  # checks the rest

    @property
    def evolution(self) -> Evolution:
        """The search over candidates; greedy removal has the same stages."""
        return Evolution(
            self.generations, self.offspring, self.stages, self.seed, _TRIES, revisits=False
        )


@dataclass(frozen=True)
class Dropped:
    """The units to drop.

    Attributes:
        layers: whole decoder layers, and layers that lose both sub-blocks.
        attention: layers that lose their attention and keep their feed-forward sub-block.
        ffn: layers that lose their feed-forward sub-block and keep their attention.
        parameters: number of dropped parameters, without norms.
        share: dropped fraction of the decoder layers' parameters.
        fitness: divergence or loss on the tokens of the last stage; None for influence and
            angular, which do not measure it.
        scores: the influence of each unit, or the angular distance of the run that begins at each
            layer.
        history: steps of greedy removal or generations of the search, with the dropped units and
            their fitness.
    """

    layers: tuple[int, ...]
    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    parameters: int
    share: float
    fitness: float | None
    scores: dict[str, float]
    history: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def choose_depth(
    target: Target, windows: Tensor, how: DepthSettings, work: Path | None, progress: Progress
) -> Dropped:
    """Choose the layers or sub-blocks to drop.

    Args:
        target: the dense model; it does not change.
        windows: calibration tokens [samples, sequence_length].
        how: how much, and by which method.
        work: folder for `depth.jsonl`, from which a stopped choice resumes; None to keep measured
            values in memory only.
        progress: receives every step.

    Raises:
        RecipeError: the model has too little to drop, or `work` belongs to another choice.
        ArchitectureError: single sub-blocks of the layers cannot be removed.
    """
    space = space_of(target, how)
    choice = DepthChoice(target, windows, how, space, work, progress)
    return choice.dropped(getattr(choice, how.method)())


def space_of(target: Target, how: DepthSettings) -> DropSpace:
    """Return the units that can be dropped, and the budget.

    Raises:
        RecipeError: the model has too little to drop.
        ArchitectureError: the model has no such units.
    """
    units = []
    total = 0
    for index, layer in enumerate(target.layers):
        sizes = parameters_of(layer)
        total += sum(sizes.values())
        for parts in _UNITS[how.units]:
            size = sum(n for part, n in sizes.items() if part & parts)
            if size:
                units.append(DepthUnit(index, parts, size, 1 if how.share is None else size))
    for parts in _UNITS[how.units]:
        if not any(unit.parts == parts for unit in units):
            raise ArchitectureError(
                f"the decoder layers of {type(target.model).__name__} have no separate "
                f"sub-blocks, so {how.units} cannot be dropped",
                remedy="drop whole layers: units: layers",
            )
    budget = how.count if how.share is None else round(how.share * total)
    assert budget is not None
    whole = sum(unit.cost for unit in units)
    if how.units in ("layers", "blocks"):
        whole -= min(unit.cost for unit in units)  # one unit must stay
    if not 0 < budget <= whole:
        asked = f"{how.count} of them" if how.share is None else f"{how.share} of all parameters"
        raise RecipeError(
            f"{asked} cannot be dropped: there are {len(units)} {how.units} with "
            f"{sum(u.parameters for u in units) / total:.2f} of the parameters",
            remedy="drop less",
        )
    return DropSpace(tuple(units), budget, len(target.layers))


class DepthChoice:
    """One choice of depth. It measures the values that its method needs, and records each step.

    Args:
        target: the dense model.
        windows: calibration tokens.
        how: how much, and by which method.
        space: the units that can be dropped.
        work: folder for the measured values.
        progress: receives every step.
    """

    def __init__(
        self,
        target: Target,
        windows: Tensor,
        how: DepthSettings,
        space: DropSpace,
        work: Path | None,
        progress: Progress,
    ) -> None:
        self.target, self.how, self.space, self.progress = target, how, space, progress
        self.ends = ModelEnds(target, windows)
        tokens = how.evolution.full_tokens
        measured = ModelEnds(target, cut_windows(windows, tokens))
        names = [unit.name for unit in space.units]
        self.tournament = Tournament(
            Lockstep(measured, SubBlocks(measured), how.objective, progress),
            space.kept,
            work / "depth.jsonl" if work else None,
            fingerprint(self.ends, tokens, how.objective, names),
        )
        self.scores: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def influence(self) -> Removal:
        """The units of least influence."""
        units = self.space.units
        found = self.tournament.noted(
            "influence", lambda: influences(self.ends, units, self.progress)
        )
        self.scores = dict(zip([unit.name for unit in units], found, strict=True))
        return lowest(self.space, found)

    def angular(self) -> Removal:
        """The consecutive layers of least angular distance."""
        length = self.space.run_length
        distances = angular_distances(self.ends, length, self.progress)
        self.scores = {str(first): distance for first, distance in enumerate(distances)}
        first = ordered(distances)[0]
        return Removal(tuple(range(first, first + length)), math.nan, ())

    def greedy(self) -> Removal:
        """The result of greedy removal."""
        self.progress.start("depth: greedy", self.space.budget)
        reached = 0
        for removal in greedy(self.space, self.how.stages, self.tournament):
            self.record("greedy", removal.candidate, removal.fitness)
            now = min(self.space.budget, self.space.cost(removal.candidate))
            self.progress.step(now - reached)
            reached = now
        self.progress.finish()
        return removal

    def search(self) -> Removal:
        """The best result of a search from the better of influence and greedy removal."""
        influence, removed = self.influence(), self.greedy()
        mutate = partial(self.space.mutate, order=removed.order)
        starts = [removed.candidate, influence.candidate]
        self.progress.start("depth: search", self.how.generations + 1)
        for best in self.how.evolution.climb(starts, mutate, self.tournament):
            stage = "search" if best.generation else "start"
            self.record(stage, best.candidate, best.fitness)
            self.progress.step()
        self.progress.finish()
        return Removal(best.candidate, best.fitness, removed.order)

    def record(self, stage: str, candidate: Candidate, fitness: float) -> None:
        """Add a step to the history.

        Raises:
            NumericalError: the fitness is not a number.
        """
        if math.isnan(fitness):
            raise NumericalError(
                f"the {self.how.objective} of every candidate is not a number",
                remedy="the model overflows on this text; use float32 or bfloat16",
            )
        dropped = self.space.names(candidate)
        self.history.append({"stage": stage, "dropped": dropped, "fitness": fitness})

    def dropped(self, removal: Removal) -> Dropped:
        """Return the units to drop, by layer."""
        kept = self.space.kept(removal.candidate)
        every = sum(sum(parameters_of(layer).values()) for layer in self.target.layers)
        parameters = sum(self.space.units[i].parameters for i in removal.candidate)
        return Dropped(
            layers=tuple(i for i, parts in enumerate(kept) if parts == 0),
            attention=tuple(i for i, parts in enumerate(kept) if parts == FFN),
            ffn=tuple(i for i, parts in enumerate(kept) if parts == ATTENTION),
            parameters=parameters,
            share=parameters / every,
            fitness=None if math.isnan(removal.fitness) else removal.fitness,
            scores=self.scores,
            history=tuple(self.history),
        )
