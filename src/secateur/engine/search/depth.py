"""Chooses the decoder layers that a model can lose.

One decoder layer is in memory at a time. This module does not change the model;
`structured.surgery` removes the chosen layers.

A candidate is a set of layers to drop: ascending indices, always the same number of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
from secateur.sparsity.evolution import Candidate, Fitness, Stages, ordered

STAGES: Stages = ((4, 1024), (1, 8192))
"""Greedy removal selects in these stages."""


@dataclass(frozen=True)
class Removal:
    """A set of dropped layers.

    Attributes:
        layers: the dropped layers, ascending.
        fitness: divergence in nats per token, on the tokens of the last stage; None for influence
            and angular, which do not measure it.
        scores: the influence of each layer, or the angular distance of the run that begins at it.
    """

    layers: Candidate
    fitness: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


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
        fitnesses: list[float] = []
        for keep, tokens in stages:
            if fitnesses and len(rest) <= keep and tokens < stages[-1][1]:
                continue  # this stage would drop none
            values = list(fitness([tuple(sorted((*dropped, i))) for i in rest], tokens, step))
            ranked = ordered(values)
            rest, fitnesses = [rest[j] for j in ranked[:keep]], [values[j] for j in ranked[:keep]]
        dropped = tuple(sorted((*dropped, rest[0])))
        yield Removal(dropped, fitnesses[0])


def choose_depth(
    target: Target,
    windows: Tensor,
    count: int,
    work: Path | None,
    progress: Progress,
    *,
    method: str = "influence",
    stages: Stages = STAGES,
    fast_matmuls: bool = True,
) -> Removal:
    """Choose the layers to drop.

    Methods:
        influence: the layers of least block influence (ShortGPT).
        angular: the consecutive layers of least angular distance (Gromov et al.).
        greedy: one layer at a time; each step drops the layer whose removal harms the whole model
            least, as SLEB (Song et al. 2024, arXiv:2402.09025).

    Deviation: greedy removal selects in stages, with fewer candidates on more tokens, by the
    divergence from the dense model; SLEB uses the loss.

    Args:
        target: the dense model; it does not change.
        windows: calibration tokens [samples, sequence_length].
        count: number of layers to drop.
        work: folder for `depth.jsonl`, from which a stopped greedy removal resumes; None to keep
            measured values in memory only.
        progress: receives every step.
        method: influence, angular or greedy.
        stages: of greedy removal.
        fast_matmuls: measure in bfloat16 if the processor is faster at it.

    Raises:
        RecipeError: `work` belongs to another choice.
        NumericalError: the divergence of every candidate is not a number.
    """
    outer = EmbeddingAndHead(target, windows, fast=fast_matmuls)
    if method == "greedy":
        few = EmbeddingAndHead(target, cut_windows(windows, stages[-1][1]), fast=fast_matmuls)
        file = work / "depth.jsonl" if work else None
        return _removed(outer, few, count, stages, file, progress)
    if method == "angular":
        scores = angular_distances(outer, count, progress)
        first = ordered(scores)[0]
        layers = tuple(range(first, first + count))
    else:
        scores = influences(outer, progress)
        layers = tuple(sorted(ordered(scores)[:count]))  # the least influence first
    return Removal(layers, scores={str(layer): score for layer, score in enumerate(scores)})


def _removed(
    outer: EmbeddingAndHead, few: EmbeddingAndHead, count: int, stages: Stages,
    file: Path | None, progress: Progress,
) -> Removal:  # fmt: skip
    """The result of greedy removal, measured on a few windows and kept in a file."""
    layers = len(outer.target.layers)

    def versions(candidate: Candidate) -> Versions:
        return tuple(LEFT_OUT if i in candidate else DENSE for i in range(layers))

    units, evaluator = [str(layer) for layer in range(layers)], CandidateEvaluator(few, progress)
    fitness = FitnessCache(evaluator, versions, units, stages[-1][1], file, outer)
    progress.start("depth: greedy", count)
    for removal in greedy(layers, count, stages, fitness):
        progress.step()
        found = removal
    progress.finish()
    if found.fitness is not None and math.isnan(found.fitness):
        raise NumericalError(
            "the divergence of every candidate is not a number",
            remedy="the model overflows on this text; use float32 or bfloat16",
        )
    return found


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
