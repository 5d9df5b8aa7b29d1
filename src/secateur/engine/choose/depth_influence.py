"""Scores of how much a layer changes its input, from one forward pass of the dense model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.engine.choose.depth_space import ATTENTION, FFN, WHOLE, DepthUnit
from secateur.engine.choose.sub_blocks import SubBlocks
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.walk import walk_layers
from secateur.progress import Progress


@torch.no_grad()
def influences(ends: ModelEnds, units: Sequence[DepthUnit], progress: Progress) -> list[float]:
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
    target, blocks = ends.target, SubBlocks(ends)
    sums = dict.fromkeys(units, 0.0)
    by_layer = [[u for u in units if u.layer == i] for i in range(len(target.layers))]
    progress.start("depth: influence", len(ends.windows) * len(by_layer))
    for part in ends.parts(range(len(ends.windows)), 2):
        states = ends.embedded(part)
        for number, layer in walk_layers(target):
            for place, before in enumerate(states):
                after = blocks.run(number, layer, WHOLE, before)
                between = before
                if any(unit.parts != WHOLE for unit in by_layer[number]):
                    between = blocks.run(number, layer, ATTENTION, before)
                around = {WHOLE: (before, after), ATTENTION: (before, between),
                          FFN: (between, after)}  # fmt: skip
                for unit in by_layer[number]:
                    sums[unit] += _mean(cosines(*map(ends.states, around[unit.parts])))
                states[place] = after
                progress.step(note=f"layer {number}")
    progress.finish()
    return [1 - sums[unit] / len(ends.windows) for unit in units]


@torch.no_grad()
def angular_distances(ends: ModelEnds, length: int, progress: Progress) -> list[float]:
    """The angular distance over every run of `length` consecutive layers, mean over all tokens t:

        d(l) = mean_t arccos( cos(x_t^l, x_t^(l+length)) ) / π

    with x^l the input of layer l. The layers l to l + length − 1 of the least d can be dropped.

    Paper: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887. Deviation: all tokens count, so a few windows are enough. The paper uses only
    the last token of each window.
    """
    count = len(ends.target.layers)
    sums = [0.0] * (count - length + 1)
    progress.start("depth: angular distance", len(ends.windows) * count)
    for part in ends.parts(range(len(ends.windows)), length + 2):
        inputs = deque([ends.embedded(part)], maxlen=length)
        for number, layer in walk_layers(ends.target):
            states = []
            for before in inputs[-1]:
                states.append(ends.run(number, layer, before))
                progress.step(note=f"layer {number}")
            if len(inputs) == length:
                for before, after in zip(inputs[0], states, strict=True):
                    cosine = cosines(ends.states(before), ends.states(after))
                    angles = cosine.clamp(-1, 1).arccos() / math.pi
                    sums[number + 1 - length] += _mean(angles)
            inputs.append(states)
    progress.finish()
    return [total / len(ends.windows) for total in sums]


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """The cosine of the two states of each token, [batch, sequence]."""
    return cosine_similarity(one.double(), two.double(), dim=-1)


def _mean(values: Tensor) -> float:
    return float(values.mean())
