"""Chooses the decoder layers that a model can lose.

One decoder layer is in memory at a time. This module does not change the model;
`structured.surgery` removes the chosen layers.

A candidate is a set of layers to drop: ascending indices, always the same number of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.engine.search.candidate_evaluator import (
    DENSE,
    LEFT_OUT,
    CandidateEvaluator,
    FitnessCache,
    Versions,
    cut_windows,
)
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.errors import NumericalError
from secateur.models.targets import Target, walk_layers
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate, Evolution, Fitness, Stages, ordered

EVOLUTION = Evolution(
    generations=12, offspring=16, stages=((4, 1024), (1, 8192)), seed=0, tries=8, revisits=False
)
"""The search over sets of layers. Greedy removal selects in the same stages."""


@dataclass(frozen=True)
class Removal:
    """A set of dropped layers.

    Attributes:
        layers: the dropped layers, ascending.
        fitness: divergence in nats per token, on the tokens of the last stage; None for influence
            and angular, which do not measure it.
        order: ranking of all layers; the best ones to drop come first.
        scores: the influence of each layer, or the angular distance of the run that begins at it.
    """

    layers: Candidate
    fitness: float | None = None
    order: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)


def mutate(candidate: Candidate, random: Random, order: Sequence[int]) -> Candidate:
    """Exchange one to three layers, small numbers more often.

    A random dropped layer is restored, and another one is dropped. The layer at position r of the
    order is drawn with probability proportional to 1/(r+1).

    Args:
        candidate: the initial candidate.
        random: source of the draws.
        order: ranking of all layers; the best ones to drop come first.
    """
    dropped = set(candidate)
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        back = random.choice(sorted(dropped))
        eligible = [i for i in order if i not in dropped]
        if not eligible:
            return candidate
        weights = [1 / (place + 1) for place in range(len(eligible))]
        dropped ^= {back, *random.choices(eligible, weights)}  # one returns, one leaves
    return tuple(sorted(dropped))


def greedy(layers: int, count: int, stages: Stages, fitness: Fitness) -> Iterator[Removal]:
    """Drop one layer at a time, always the least harmful one, and yield every step.

    Each step tries all remaining layers. Later stages keep fewer of them on more tokens.

    Args:
        layers: number of decoder layers.
        count: number of layers to drop.
        stages: of a selection.
        fitness: measures candidates.
    """
    dropped: Candidate = ()
    for step in range(count):  # a step has windows of its own, the same for all candidates
        rest = [i for i in range(layers) if i not in dropped]
        tried: list[int] = []
        fitnesses: list[float] = []
        for keep, tokens in stages:
            if tried and len(rest) <= keep and tokens < stages[-1][1]:
                continue  # this stage would drop none
            values = list(fitness([tuple(sorted((*dropped, i))) for i in rest], tokens, step))
            ranked = ordered(values)
            tried = tried or [rest[j] for j in ranked]
            rest, fitnesses = [rest[j] for j in ranked[:keep]], [values[j] for j in ranked[:keep]]
        dropped = tuple(sorted((*dropped, rest[0])))
        yield Removal(dropped, fitnesses[0], (*dropped, *(i for i in tried if i != rest[0])))


def choose_depth(
    target: Target,
    windows: Tensor,
    count: int,
    work: Path | None,
    progress: Progress,
    *,
    method: str = "influence",
    evolution: Evolution = EVOLUTION,
    fast_matmuls: bool = True,
) -> Removal:
    """Choose the layers to drop.

    Methods:
        influence: the layers of least block influence (ShortGPT).
        angular: the consecutive layers of least angular distance (Gromov et al.).
        greedy: one layer at a time; each step drops the layer whose removal harms the whole model
            least, as SLEB (Song et al. 2024, arXiv:2402.09025).
        search: an evolutionary search from the better of influence and greedy. It exchanges dropped
            layers for kept ones (EvoPress, Sieberling et al. 2024, arXiv:2410.14649).

    Deviations: greedy removal and search select in stages, with fewer candidates on more tokens,
    by the divergence from the dense model; SLEB uses the loss. The search begins with the result of
    greedy removal, draws layers to drop by the ranking from greedy removal, and measures no
    candidate twice.

    Args:
        target: the dense model; it does not change.
        windows: calibration tokens [samples, sequence_length].
        count: number of layers to drop.
        work: folder for `depth.jsonl`, from which a stopped choice resumes; None to keep measured
            values in memory only.
        progress: receives every step.
        method: influence, angular, greedy or search.
        evolution: the search, and the stages of greedy removal.
        fast_matmuls: measure in bfloat16 if the processor is faster at it.

    Raises:
        RecipeError: `work` belongs to another choice.
        NumericalError: the divergence of every candidate is not a number.
    """
    outer = EmbeddingAndHead(target, windows, fast=fast_matmuls)
    file = work / "depth.jsonl" if work else None
    choice = _DepthChoice(outer, count, evolution, file, progress, fast=fast_matmuls)
    found: Removal = getattr(choice, method)()
    if found.fitness is not None and math.isnan(found.fitness):
        raise NumericalError(
            "the divergence of every candidate is not a number",
            remedy="the model overflows on this text; use float32 or bfloat16",
        )
    return found


class _DepthChoice:
    """One choice of depth. It measures the values that its method needs, and keeps them in a file.

    Args:
        outer: embedding and head of the dense model, with all windows.
        count: number of layers to drop.
        evolution: the search, and the stages of greedy removal.
        file: of measured values; None for memory.
        progress: receives every step.
        fast: whether products may be in bfloat16.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        count: int,
        evolution: Evolution,
        file: Path | None,
        progress: Progress,
        *,
        fast: bool,
    ) -> None:
        self.outer, self.count, self.evolution, self.progress = outer, count, evolution, progress
        target, tokens = outer.target, evolution.full_tokens
        self.layers = len(target.layers)
        measured = EmbeddingAndHead(target, cut_windows(outer.windows, tokens), fast=fast)
        units = [str(layer) for layer in range(self.layers)]
        evaluator = CandidateEvaluator(measured, progress)
        self.fitness = FitnessCache(evaluator, self.versions, units, tokens, file, outer)

    def versions(self, candidate: Candidate) -> Versions:
        """A version for each layer: dense, or dropped."""
        return tuple(LEFT_OUT if i in candidate else DENSE for i in range(self.layers))

    def influence(self) -> Removal:
        """The layers of least influence."""
        measure = partial(influences, self.outer, self.progress)
        found: list[float] = self.fitness.noted("influence", measure)
        layers = tuple(sorted(ordered(found)[: self.count]))  # the least influence first
        return Removal(layers, scores={str(layer): score for layer, score in enumerate(found)})

    def angular(self) -> Removal:
        """The consecutive layers of least angular distance."""
        length = self.count
        distances = angular_distances(self.outer, length, self.progress)
        first = ordered(distances)[0]
        scores = {str(layer): distance for layer, distance in enumerate(distances)}
        return Removal(tuple(range(first, first + length)), scores=scores)

    def greedy(self) -> Removal:
        """The result of greedy removal."""
        self.progress.start("depth: greedy", self.count)
        for removal in greedy(self.layers, self.count, self.evolution.stages, self.fitness):
            self.progress.step()
            found = removal
        self.progress.finish()
        return found

    def search(self) -> Removal:
        """The best result of a search from the better of influence and greedy removal."""
        influence, removed = self.influence(), self.greedy()
        starts = [removed.layers, influence.layers]
        self.progress.start("depth: search", self.evolution.generations + 1)
        mutated = partial(mutate, order=removed.order)
        for leader in self.evolution.climb(starts, mutated, self.fitness):
            self.progress.step()
            best = leader
        self.progress.finish()
        return Removal(best.candidate, best.fitness, removed.order, influence.scores)


@torch.no_grad()
def influences(outer: EmbeddingAndHead, progress: Progress) -> list[float]:
    """The block influence of every layer, mean over all tokens t:

        BI = 1 − mean_t cos(a_t, b_t)

    with a the input of the layer and b its output.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv:2403.03853.
    """
    sums = [0.0] * len(outer.target.layers)
    progress.start("depth: influence", len(outer.windows) * len(sums))
    for part in outer.parts(range(len(outer.windows)), 2):
        states = outer.embedded(part)
        for number, layer in walk_layers(outer.target):
            for place, before in enumerate(states):
                states[place] = outer.run(number, layer, before)
                cosine = _cosines(outer.states(before), outer.states(states[place]))
                sums[number] += float(cosine.mean())
                progress.step(note=f"layer {number}")
    progress.finish()
    return [1 - total / len(outer.windows) for total in sums]


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
    # the inputs of `length` layers are in memory, and the states before and after one
    for part in outer.parts(range(len(outer.windows)), length + 2):
        inputs = deque([outer.embedded(part)], maxlen=length)  # of the last `length` layers
        for number, layer in walk_layers(outer.target):
            states = []
            for before in inputs[-1]:
                states.append(outer.run(number, layer, before))
                progress.step(note=f"layer {number}")
            if len(inputs) == length:  # `states` enter the layer after the run
                for before, after in zip(inputs[0], states, strict=True):
                    cosine = _cosines(outer.states(before), outer.states(after))
                    angles = cosine.clamp(-1, 1).arccos() / math.pi
                    sums[number + 1 - length] += float(angles.mean())
            inputs.append(states)
    progress.finish()
    return [total / len(outer.windows) for total in sums]


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    """The cosine of the two states of each token, [batch, sequence]."""
    return cosine_similarity(one.double(), two.double(), dim=-1)
