"""Chooses the decoder layers, or their sub-blocks, that a model can lose.

One decoder layer is in memory at a time. This module does not change the model;
`structured.surgery` removes the chosen units.

The first part knows no model: the cost of a set of layers or sub-blocks, greedy removal, and the
mutations of the search (`sparsity.evolution`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from secateur.engine.search.candidate_evaluator import (
    CandidateEvaluator,
    FitnessCache,
    Version,
    cut_windows,
)
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import Target, walk_layers
from secateur.errors import ArchitectureError, NumericalError, RecipeError
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate, Evolution, Fitness, Stages, ordered

ATTENTION, FFN = 1, 2
WHOLE = ATTENTION | FFN
"""Sub-blocks as bits."""


@dataclass(frozen=True)
class DepthUnit:
    """A layer or sub-block, dropped or kept as a whole.

    Attributes:
        layer: index of the decoder layer.
        parts: ATTENTION, FFN or WHOLE.
        parameters: number of its parameters.
        cost: its cost in the budget.
    """

    layer: int
    parts: int
    parameters: int
    cost: int

    @property
    def name(self) -> str:
        """`3`, `3.attention` or `3.ffn`."""
        kind = {WHOLE: "", ATTENTION: ".attention", FFN: ".ffn"}[self.parts]
        return f"{self.layer}{kind}"


@dataclass(frozen=True)
class DropSpace:
    """All candidates: sets of units whose costs reach the budget.

    A candidate holds ascending indices into `units`: the units that it drops.

    Attributes:
        units: units that can be dropped, in the order of the layers.
        budget: the sum of costs to reach.
        layers: number of decoder layers.
    """

    units: tuple[DepthUnit, ...]
    budget: int
    layers: int

    @property
    def run_length(self) -> int:
        """The smallest number of consecutive units that reach the budget from any starting unit."""
        costs = [unit.cost for unit in self.units]
        return next(
            n
            for n in range(1, len(costs) + 1)
            if min(sum(costs[i : i + n]) for i in range(len(costs) - n + 1)) >= self.budget
        )

    def cost(self, candidate: Candidate) -> int:
        """The sum of the costs of the units that a candidate drops."""
        return sum(self.units[i].cost for i in candidate)

    def kept(self, candidate: Candidate) -> tuple[int, ...]:
        """The sub-blocks that each layer keeps."""
        kept = [WHOLE] * self.layers
        for i in candidate:
            kept[self.units[i].layer] &= ~self.units[i].parts
        return tuple(kept)

    def names(self, candidate: Candidate) -> list[str]:
        """The names of the units that a candidate drops."""
        return [self.units[i].name for i in candidate]

    def spare(self, candidate: Candidate) -> list[int]:
        """The spare units of a candidate: it reaches the budget without any single one of them."""
        beyond = self.cost(candidate) - self.budget
        return [i for i in candidate if self.units[i].cost <= beyond]

    def mutate(self, candidate: Candidate, random: Random, order: Sequence[int]) -> Candidate:
        """Exchange one to three units, small numbers more often. The result reaches the budget.

        A random dropped unit is restored. Other units are dropped until the sum reaches the budget.
        The unit at position r of the order is drawn with probability proportional to 1/(r+1). If
        units differ in cost, spare units are restored.

        Args:
            candidate: the initial candidate.
            random: source of the draws.
            order: ranking of all units; the best ones to drop come first.
        """
        dropped = set(candidate)
        for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
            back = random.choice(sorted(dropped))
            dropped.discard(back)
            while self.cost(tuple(dropped)) < self.budget:
                eligible = [i for i in order if i not in dropped and i != back]
                if not eligible:
                    return candidate
                weights = [1 / (place + 1) for place in range(len(eligible))]
                dropped.add(random.choices(eligible, weights)[0])
            while spare := self.spare(tuple(sorted(dropped))):
                dropped.discard(random.choice(spare))
        return tuple(sorted(dropped))


@dataclass(frozen=True)
class Removal:
    """A set of dropped units.

    Attributes:
        candidate: the dropped units.
        fitness: fitness of the candidate on the tokens of the last stage; NaN if not measured.
        order: ranking of all units; the best ones to drop come first.
    """

    candidate: Candidate
    fitness: float
    order: tuple[int, ...]


def lowest(space: DropSpace, scores: Sequence[float]) -> Removal:
    """Drop the units of lowest score per cost until the budget is reached, and no more.

    If units differ in cost, the last unit may exceed the budget. Then spare units are restored,
    starting with the highest score.
    """
    ratios = [score / unit.cost for score, unit in zip(scores, space.units, strict=True)]
    order = ordered(ratios)
    dropped: Candidate = ()
    for i in order:
        if space.cost(dropped) < space.budget:
            dropped = tuple(sorted((*dropped, i)))
    while spare := space.spare(dropped):
        back = max(spare, key=lambda i: scores[i])
        dropped = tuple(i for i in dropped if i != back)
    return Removal(dropped, math.nan, tuple(order))


def greedy(space: DropSpace, stages: Stages, fitness: Fitness) -> Iterator[Removal]:
    """Drop one unit at a time, always the least harmful one, and yield every step.

    Each step tries all remaining units. Later stages keep fewer of them on more tokens. If units
    differ in cost, the harm of a unit is divided by its cost; only the part of the cost within the
    budget counts. At the end, spare units are restored.
    """
    dropped: Candidate = ()
    step = 0
    order: tuple[int, ...] = ()
    while (missing := space.budget - space.cost(dropped)) > 0:
        rest = [i for i in range(len(space.units)) if i not in dropped]
        tried: list[int] = []
        fitnesses: list[float] = []
        for keep, tokens in stages:
            if tried and len(rest) <= keep and tokens < stages[-1][1]:
                continue
            with_one = [tuple(sorted((*dropped, i))) for i in rest]
            *values, base = fitness([*with_one, dropped], tokens, step)
            counted = [min(space.units[i].cost, missing) for i in rest]
            ranked = ordered([(v - base) / c for v, c in zip(values, counted, strict=True)])
            tried = tried or [rest[j] for j in ranked]
            rest, fitnesses = [rest[j] for j in ranked[:keep]], [values[j] for j in ranked[:keep]]
        dropped = tuple(sorted((*dropped, rest[0])))
        step += 1
        order = (*dropped, *(i for i in tried if i != rest[0]))
        yield Removal(dropped, fitnesses[0], order)
    while spare := space.spare(dropped):
        without = [tuple(i for i in dropped if i != back) for back in spare]
        values = list(fitness(without, stages[-1][1], step))
        best = ordered(values)[0]
        dropped = without[best]
        yield Removal(dropped, values[best], order)


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
        fast_matmuls: measure in bfloat16 if the processor is faster at it.

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
    fast_matmuls: bool = True

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
        sizes = _parameters_of(layer)
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
        amount = f"{how.count} of them" if how.share is None else f"{how.share} of all parameters"
        raise RecipeError(
            f"{amount} cannot be dropped: there are {len(units)} {how.units} with "
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
        self.outer = EmbeddingAndHead(target, windows, fast=how.fast_matmuls)
        tokens = how.evolution.full_tokens
        measured = EmbeddingAndHead(target, cut_windows(windows, tokens), fast=how.fast_matmuls)
        names = [unit.name for unit in space.units]
        self.fitness = FitnessCache(
            CandidateEvaluator(measured, SubBlocks(measured), how.objective, progress),
            space.kept,
            names,
            tokens,
            work / "depth.jsonl" if work else None,
            self.outer,
        )
        self.scores: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def influence(self) -> Removal:
        """The units of least influence."""
        units = self.space.units
        found = self.fitness.noted(
            "influence", lambda: influences(self.outer, units, self.progress)
        )
        self.scores = dict(zip([unit.name for unit in units], found, strict=True))
        return lowest(self.space, found)

    def angular(self) -> Removal:
        """The consecutive layers of least angular distance."""
        length = self.space.run_length
        distances = angular_distances(self.outer, length, self.progress)
        self.scores = {str(first): distance for first, distance in enumerate(distances)}
        first = ordered(distances)[0]
        return Removal(tuple(range(first, first + length)), math.nan, ())

    def greedy(self) -> Removal:
        """The result of greedy removal."""
        self.progress.start("depth: greedy", self.space.budget)
        reached = 0
        for removal in greedy(self.space, self.how.stages, self.fitness):
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
        for best in self.how.evolution.climb(starts, mutate, self.fitness):
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
        every = sum(sum(_parameters_of(layer).values()) for layer in self.target.layers)
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


@torch.no_grad()
def influences(
    outer: EmbeddingAndHead, units: Sequence[DepthUnit], progress: Progress
) -> list[float]:
    """The block influence of every unit, mean over all tokens t:

        BI = 1 − mean_t cos(a_t, b_t)

    with a before the unit and b after it in the residual stream. For a layer these are its input
    and its output; for an attention sub-block x and x + attention(x); for a feed-forward sub-block
    x + attention(x) and the layer's output.

    Papers: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv:2403.03853; for sub-blocks He et al. 2024, "What Matters in Transformers? Not
    All Attention is Needed", arXiv:2406.15786. If attention and feed-forward run in parallel,
    they still count in this order.
    """
    target, blocks = outer.target, SubBlocks(outer)
    sums = dict.fromkeys(units, 0.0)
    by_layer = [[u for u in units if u.layer == i] for i in range(len(target.layers))]
    progress.start("depth: influence", len(outer.windows) * len(by_layer))
    for part in outer.parts(range(len(outer.windows)), 2):
        states = outer.embedded(part)
        for number, layer in walk_layers(target):
            for place, before in enumerate(states):
                after = blocks.run(number, layer, WHOLE, before)
                between = before
                if any(unit.parts != WHOLE for unit in by_layer[number]):
                    between = blocks.run(number, layer, ATTENTION, before)
                around = {WHOLE: (before, after), ATTENTION: (before, between),
                          FFN: (between, after)}  # fmt: skip
                for unit in by_layer[number]:
                    sums[unit] += _mean(_cosines(*map(outer.states, around[unit.parts])))
                states[place] = after
                progress.step(note=f"layer {number}")
    progress.finish()
    return [1 - sums[unit] / len(outer.windows) for unit in units]


@torch.no_grad()
def angular_distances(outer: EmbeddingAndHead, length: int, progress: Progress) -> list[float]:
    """The angular distance over every run of `length` consecutive layers, mean over all tokens t:

        d(l) = mean_t arccos( cos(x_t^l, x_t^(l+length)) ) / π

    with x^l the input of layer l. The layers l to l + length − 1 of the least d can be dropped.

    Paper: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887. Deviation: all tokens count, so a few windows are enough. The paper uses only
    the last token of each window.
    """
    count = len(outer.target.layers)
    sums = [0.0] * (count - length + 1)
    progress.start("depth: angular distance", len(outer.windows) * count)
    for part in outer.parts(range(len(outer.windows)), length + 2):
        inputs = deque([outer.embedded(part)], maxlen=length)
        for number, layer in walk_layers(outer.target):
            states = []
            for before in inputs[-1]:
                states.append(outer.run(number, layer, before))
                progress.step(note=f"layer {number}")
            if len(inputs) == length:
                for before, after in zip(inputs[0], states, strict=True):
                    cosine = _cosines(outer.states(before), outer.states(after))
                    angles = cosine.clamp(-1, 1).arccos() / math.pi
                    sums[number + 1 - length] += _mean(angles)
            inputs.append(states)
    progress.finish()
    return [total / len(outer.windows) for total in sums]


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    """The cosine of the two states of each token, [batch, sequence]."""
    return cosine_similarity(one.double(), two.double(), dim=-1)


def _mean(values: Tensor) -> float:
    return float(values.mean())


_NAMES = {ATTENTION: "attention", FFN: "feed-forward"}


def _parts_of(layer: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules of a decoder layer that make up its attention and its feed-forward sub-block.

    Every child with a matrix belongs to one of the two: to attention if its name or class contains
    that word, else to the feed-forward sub-block. Norms belong to neither.
    """
    parts: dict[int, list[nn.Module]] = {ATTENTION: [], FFN: []}
    for name, child in layer.named_children():
        if any(p.ndim > 1 for p in child.parameters()):
            text = f"{name} {type(child).__name__}".lower()
            parts[ATTENTION if "attn" in text or "attention" in text else FFN].append(child)
    return parts


def _parameters_of(layer: nn.Module) -> dict[int, int]:
    """How many parameters each sub-block of a layer has."""
    return {
        part: sum(p.numel() for module in modules for p in module.parameters())
        for part, modules in _parts_of(layer).items()
    }


class SubBlocks:
    """Runs layers without some of their sub-blocks.

    The version of a layer is the sum of the sub-blocks that it keeps: ATTENTION, FFN or WHOLE.

    A removed sub-block adds nothing to the residual stream: its modules return zeros. Without both
    sub-blocks the layer must be the identity. That is checked once for each layer that loses a
    sub-block. So a family is refused if something else writes to the stream: a norm with a bias
    after the sub-blocks, or a norm on the stream itself.

    Args:
        outer: embedding and head of the dense model.
    """

    dense: Version = WHOLE

    def __init__(self, outer: EmbeddingAndHead) -> None:
        self.outer = outer
        self.outputs: dict[tuple[int, int], list[int]] = {}

    @contextmanager
    def opened(
        self, number: int, layer: nn.Module
    ) -> Iterator[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """The forward of each version of a layer."""

        def forward_of(version: Version) -> Callable[[Tensor], Tensor]:
            return partial(self.run, number, layer, cast(int, version))

        yield forward_of

    def run(self, number: int, layer: nn.Module, kept: int, hidden: Tensor) -> Tensor:
        """Run a layer that keeps at least one of its sub-blocks.

        Raises:
            ArchitectureError: the layer does more than add its sub-blocks to the stream.
        """
        if kept == WHOLE:
            return self.outer.run(number, layer, hidden)
        if (number, ATTENTION) not in self.outputs:
            self.learn(number, layer, hidden)
        with self.silenced(number, layer, WHOLE & ~kept):
            return self.outer.run(number, layer, hidden)

    def learn(self, number: int, layer: nn.Module, hidden: Tensor) -> None:
        """Record what the sub-blocks of a layer return, and check that it adds nothing without
        them.

        Raises:
            ArchitectureError: it adds something.
        """
        returned: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: Any, out: Any) -> None:
            returned[module] = len(out) if isinstance(out, tuple) else 0

        parts = _parts_of(layer)
        handles = [m.register_forward_hook(note) for ms in parts.values() for m in ms]
        try:
            self.outer.run(number, layer, hidden)
        finally:
            for handle in handles:
                handle.remove()
        for part, modules in parts.items():
            self.outputs[number, part] = [returned.get(module, 0) for module in modules]
        with self.silenced(number, layer, WHOLE):
            if not torch.equal(self.outer.run(number, layer, hidden), hidden):
                raise ArchitectureError(
                    f"without {' and '.join(_NAMES.values())} a {type(layer).__name__} still "
                    "changes its input, so sub-blocks cannot be dropped one by one",
                    where=self.outer.target.architecture.layer_name(number),
                    remedy="drop whole layers: units: layers",
                )

    @contextmanager
    def silenced(self, number: int, layer: nn.Module, missing: int) -> Iterator[None]:
        """A context in which some sub-blocks of a layer return zeros.

        Only `forward` is replaced, because layers read attributes of their attention.
        """
        parts = _parts_of(layer)
        chosen = [
            (module, outputs)
            for part in (ATTENTION, FFN)
            if part & missing
            for module, outputs in zip(parts[part], self.outputs[number, part], strict=True)
        ]
        before = [vars(module).get("forward") for module, _ in chosen]
        for module, outputs in chosen:
            vars(module)["forward"] = _zeros(outputs)
        try:
            yield
        finally:
            for (module, _), forward in zip(chosen, before, strict=True):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward


def _zeros(outputs: int) -> Callable[..., Any]:
    """A forward that returns zeros in the shape of its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, *[None] * (outputs - 1)) if outputs else nothing

    return forward
