"""Which decoder layers, or which of their sub-blocks, a model can do without.

One decoder layer is in memory at a time, whatever is measured. The model is only looked at:
surgery takes what is dropped here out of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from secateur.engine.choose.depth_influence import angular_distances, influences
from secateur.engine.choose.depth_judge import Judge, Measured
from secateur.engine.choose.depth_space import (
    ATTENTION,
    FFN,
    WHOLE,
    Space,
    Stages,
    Standing,
    Unit,
    evolve,
    greedy,
    lowest,
)
from secateur.engine.choose.depth_stream import Stream, parameters_of
from secateur.engine.choose.tournament import cut
from secateur.engine.stream.targets import Target
from secateur.errors import ArchitectureError, NumericalError, RecipeError
from secateur.progress import Progress
from secateur.sparsity.allocation.search import check_stages

__all__ = ["Depth", "Dropped", "choose_depth", "space_of"]

_UNITS = {
    "layers": (WHOLE,),
    "attention": (ATTENTION,),
    "ffn": (FFN,),
    "blocks": (ATTENTION, FFN),
}
_METHODS = ("influence", "angular", "greedy", "search")
_OBJECTIVES = ("divergence", "loss")


@dataclass(frozen=True)
class Depth:
    """How much depth goes, and how it is chosen.

    Methods:
        influence: the units of least block influence (ShortGPT), per parameter.
        angular: the run of consecutive layers of least angular distance (Gromov et al.).
        greedy: one unit after the other, each time the one whose loss hurts the whole model
            least, tried anew after every removal. With `objective="loss"` and one stage this is
            SLEB (Song et al. 2024, arXiv:2402.09025).
        search: from the better of influence and greedy, an evolutionary search that exchanges
            dropped units for kept ones (EvoPress, Sieberling et al. 2024, arXiv:2410.14649).

    Deviations: greedy removal and search select in stages, few candidates on many tokens; of
    SLEB's loss and EvoPress's divergence either is there for both; the search starts from what
    greedy removal found, draws what it drops by the order that greedy removal left, sees no
    candidate twice, and exchanges units of different size within one budget of parameters.

    Args:
        units: `layers`, `attention`, `ffn` (sub-blocks of one kind), or `blocks` (of both).
        count: units to drop; not for `blocks`, which differ in size.
        share: fraction of the decoder layers' parameters to drop instead, norms not counted; at
            least so many go.
        method: influence, angular, greedy or search.
        objective: `divergence` from the dense model, or `loss`, of the next tokens.
        stages: (survivors, tokens) of each stage of a selection; the last keeps 1.
        generations: of the search.
        offspring: mutants in a generation.
        seed: of the mutations.

    Raises:
        RecipeError: a parameter is out of range, or they contradict each other.
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
                remedy="say by one of them how much depth goes",
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
                f"angular distance is that of whole layers, and units are {self.units}",
                remedy="give units: layers, or another method",
            )
        self._check_selection()

    def _check_selection(self) -> None:
        if self.generations < 0 or self.offspring < 1:
            raise RecipeError(
                f"{self.generations} generations of {self.offspring} offspring cannot be made",
                remedy="give 0 or more generations of 1 or more offspring",
            )
        check_stages(self.stages, "((4, 1024), (1, 8192))")

    @property
    def judged_tokens(self) -> int:
        """Tokens that the last stage judges by."""
        return self.stages[-1][1]


@dataclass(frozen=True)
class Dropped:
    """What goes.

    Attributes:
        layers: whole decoder layers, among them those that lose both sub-blocks.
        attention: layers that lose their attention and keep their feed-forward sub-block.
        ffn: layers that lose their feed-forward sub-block and keep their attention.
        parameters: how many go, norms not counted.
        share: of the decoder layers' parameters.
        fitness: divergence or loss on the tokens of the last stage; None where it was not asked
            for (influence, angular).
        scores: influence of each unit, or the angular distance from each layer on.
        history: of greedy removal and search: step or generation, what was dropped, its fitness.
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
    target: Target, windows: Tensor, how: Depth, work: Path | None, progress: Progress
) -> Dropped:
    """Choose the layers or sub-blocks to drop.

    Args:
        target: the model, dense; it stays as it is.
        windows: calibration tokens [samples, sequence_length].
        how: how much, and by what method.
        work: folder that takes `depth.jsonl`, from which a killed choice goes on; None for memory
            only.
        progress: told of every step.

    Raises:
        RecipeError: the model has not that much to drop, or `work` is that of another choice.
        ArchitectureError: the layers cannot lose sub-blocks one by one.
    """
    space = space_of(target, how)
    choice = Choice(target, windows, how, space, work, progress)
    standing = getattr(choice, how.method)()
    return choice.dropped(standing)


def space_of(target: Target, how: Depth) -> Space:
    """The units that can be dropped, and how much of them has to be.

    Raises:
        RecipeError: there is not that much.
        ArchitectureError: there are no such units.
    """
    units = []
    total = 0
    for index, layer in enumerate(target.layers):
        sizes = parameters_of(layer)
        total += sum(sizes.values())
        for parts in _UNITS[how.units]:
            size = sum(n for part, n in sizes.items() if part & parts)
            if size:
                units.append(Unit(index, parts, size, 1 if how.share is None else size))
    for parts in _UNITS[how.units]:
        if not any(unit.parts == parts for unit in units):
            raise ArchitectureError(
                f"the decoder layers of {type(target.model).__name__} have no sub-blocks that "
                f"could be told apart, so {how.units} cannot be dropped",
                remedy="drop whole layers: units: layers",
            )
    budget = how.count if how.share is None else round(how.share * total)
    assert budget is not None
    whole = sum(unit.cost for unit in units)
    if how.units in ("layers", "blocks"):
        whole -= min(unit.cost for unit in units)  # something has to stay
    if not 0 < budget <= whole:
        asked = f"{how.count} of them" if how.share is None else f"{how.share} of all parameters"
        raise RecipeError(
            f"{asked} cannot be dropped: there are {len(units)} {how.units} with "
            f"{sum(u.parameters for u in units) / total:.2f} of the parameters",
            remedy="drop less",
        )
    return Space(tuple(units), budget, len(target.layers))


class Choice:
    """One choice of depth: measures what its method asks for and keeps what happened.

    Args:
        target: the model, dense.
        windows: calibration tokens.
        how: how much, and by what method.
        space: what can be dropped.
        work: folder for what was measured.
        progress: told of every step.
    """

    def __init__(
        self,
        target: Target,
        windows: Tensor,
        how: Depth,
        space: Space,
        work: Path | None,
        progress: Progress,
    ) -> None:
        self.target, self.how, self.space, self.progress = target, how, space, progress
        self.stream = Stream(target, windows)
        judge = Judge(Stream(target, cut(windows, how.judged_tokens)), how.objective, progress)
        fingerprint = {
            "windows": checksum(windows),
            "judged_tokens": how.judged_tokens,
            "objective": how.objective,
            "embedded": checksum(self.stream.first([0])[0]),
            "units": [unit.name for unit in space.units],
        }
        file = work / "depth.jsonl" if work else None
        self.measured = Measured(space, judge, file, fingerprint)
        self.scores: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def influence(self) -> Standing:
        """The units of least influence."""
        found = self.measured.influence
        if found is None:
            found = influences(self.stream, self.space.units, self.progress)
            self.measured.keep_influence(found)
        names = [unit.name for unit in self.space.units]
        self.scores = dict(zip(names, found, strict=True))
        return lowest(self.space, found)

    def angular(self) -> Standing:
        """The consecutive layers of least angular distance."""
        length = self.space.run_length
        distances = angular_distances(self.stream, length, self.progress)
        self.scores = {str(first): distance for first, distance in enumerate(distances)}
        first = min(range(len(distances)), key=lambda i: (math.isnan(distances[i]), distances[i]))
        return Standing(tuple(range(first, first + length)), math.nan, ())

    def greedy(self) -> Standing:
        """What greedy removal ends with."""
        standing = None
        self.progress.start("depth: greedy", self.space.budget)
        reached = 0
        for standing in greedy(self.space, self.how.stages, self.measured):
            self.note("greedy", standing)
            now = min(self.space.budget, self.space.cost(standing.candidate))
            self.progress.step(now - reached)
            reached = now
        self.progress.finish()
        assert standing is not None
        return standing

    def search(self) -> Standing:
        """The best that a search finds from the better of influence and greedy removal."""
        starts = [self.influence(), self.greedy()]
        tokens, order = self.how.judged_tokens, starts[1].order
        worth = self.measured([start.candidate for start in starts], tokens, 0)
        better = 0 if worth[0] < worth[1] else 1
        best = Standing(starts[better].candidate, worth[better], order)
        self.note("start", best)
        self.progress.start("depth: search", self.how.generations)
        how = self.how
        for standing in evolve(
            self.space, best, how.generations, how.offspring, how.stages, how.seed, self.measured
        ):
            best = standing
            self.note("search", best)
            self.progress.step()
        self.progress.finish()
        return best

    def note(self, stage: str, standing: Standing) -> None:
        """Keep where a method stands."""
        if math.isnan(standing.fitness):
            raise NumericalError(
                f"the {self.how.objective} of every candidate is not a number",
                remedy="the model overflows on this text; use float32 or bfloat16",
            )
        dropped = self.space.names(standing.candidate)
        self.history.append({"stage": stage, "dropped": dropped, "fitness": standing.fitness})

    def dropped(self, standing: Standing) -> Dropped:
        """What goes in the end, by layer."""
        kept = self.space.kept(standing.candidate)
        every = sum(sum(parameters_of(layer).values()) for layer in self.target.layers)
        parameters = sum(self.space.units[i].parameters for i in standing.candidate)
        return Dropped(
            layers=tuple(i for i, parts in enumerate(kept) if parts == 0),
            attention=tuple(i for i, parts in enumerate(kept) if parts == FFN),
            ffn=tuple(i for i, parts in enumerate(kept) if parts == ATTENTION),
            parameters=parameters,
            share=parameters / every,
            fitness=None if math.isnan(standing.fitness) else standing.fitness,
            scores=self.scores,
            history=tuple(self.history),
        )


def checksum(tensor: Tensor) -> str:
    """A short name for the values of a tensor."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{crc32(data.numpy().tobytes()):08x}"
