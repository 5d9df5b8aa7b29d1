"""How little a layer changes what passes it: scores of one forward pass of the dense model."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.engine.choose.depth_space import ATTENTION, FFN, WHOLE, Unit
from secateur.engine.choose.depth_stream import Stream
from secateur.progress import Progress

__all__ = ["angular_distances", "influences"]


@torch.no_grad()
def influences(stream: Stream, units: tuple[Unit, ...], progress: Progress) -> list[float]:
    """The block influence of every unit, mean over all tokens t:

        BI = 1 − mean_t cos(a_t, b_t)

    with a before the unit and b behind it in the residual stream: of a layer its input and its
    output; of an attention sub-block x and x + attention(x); of a feed-forward one x +
    attention(x) and the layer's output.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv:2403.03853; of sub-blocks He et al. 2024, "What Matters in Transformers? Not All
    Attention is Needed", arXiv:2406.15786. Where attention and feed-forward run side by side, both
    are still taken in this order.
    """
    sums = dict.fromkeys(units, 0.0)
    by_layer = [[u for u in units if u.layer == i] for i in range(len(stream.calls))]
    progress.start("depth: influence", len(stream.windows) * len(stream.calls))
    for part in stream.parts(range(len(stream.windows)), 2):
        states = stream.first(part)
        for index, wanted in enumerate(by_layer):
            with stream.target.layer(index) as layer:
                for place, before in enumerate(states):
                    behind = stream.run(index, layer, before, WHOLE)
                    between = before
                    if any(unit.parts != WHOLE for unit in wanted):
                        between = stream.run(index, layer, before, ATTENTION)
                    ends = {WHOLE: (before, behind), ATTENTION: (before, between),
                            FFN: (between, behind)}  # fmt: skip
                    for unit in wanted:
                        sums[unit] += _mean(cosines(*ends[unit.parts]))
                    states[place] = behind
                    progress.step(note=f"layer {index}")
    progress.finish()
    return [1 - sums[unit] / len(stream.windows) for unit in units]


@torch.no_grad()
def angular_distances(stream: Stream, length: int, progress: Progress) -> list[float]:
    """The angular distance over every run of `length` consecutive layers, mean over all tokens t:

        d(l) = mean_t arccos( cos(x_t^l, x_t^(l+length)) ) / π

    with x^l the input of layer l. Layers l to l + length − 1 of the least d can be dropped.

    Paper: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887. Deviation: all tokens count, not the last of each window only, so that few
    windows will do.
    """
    count = len(stream.calls)
    sums = [0.0] * (count - length + 1)
    progress.start("depth: angular distance", len(stream.windows) * count)
    for part in stream.parts(range(len(stream.windows)), length + 2):
        inputs = deque([stream.first(part)], maxlen=length)
        for index in range(count):
            with stream.target.layer(index) as layer:
                states = []
                for before in inputs[-1]:
                    states.append(stream.run(index, layer, before, WHOLE))
                    progress.step(note=f"layer {index}")
            if len(inputs) == length:
                for before, behind in zip(inputs[0], states, strict=True):
                    angles = cosines(before, behind).clamp(-1, 1).arccos() / math.pi
                    sums[index + 1 - length] += _mean(angles)
            inputs.append(states)
    progress.finish()
    return [total / len(stream.windows) for total in sums]


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """The cosine of the two states of each token, [batch, sequence]."""
    return cosine_similarity(one.double(), two.double(), dim=-1)


def _mean(values: Tensor) -> float:
    return float(values.mean())
