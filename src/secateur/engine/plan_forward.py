"""Times one micro-batch in the decoder layers themselves, and the reading of their weights.

One decoder layer of each kind is read and gets real hidden states, so attention, norms and routing
count as they are.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from secateur.engine.learning_memory import calls_of
from secateur.engine.prune.settings import Settings
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.kinds import kind_of
from secateur.engine.stream.targets import Target

CALLS = 3
LONG = 2.0
"""Seconds of a call after which it is not repeated."""


@dataclass(frozen=True)
class LayerTimes:
    """The time of all decoder layers together.

    Attributes:
        forward: seconds for each token that passes through all layers; 0 without calibration.
        reading: seconds to read all layers once.
    """

    forward: float
    reading: float


def layer_times(target: Target, windows: Tensor | None, settings: Settings) -> LayerTimes:
    """Time one layer of each kind, and scale by the number of its layers.

    Args:
        target: the model.
        windows: calibration tokens, or None.
        settings: how the work is done.
    """
    layers = list(target.layers)
    if windows is None:
        return LayerTimes(0.0, len(layers) * read_seconds(target, 0))
    size = max(1, settings.micro_batch_tokens // windows.shape[1])
    hidden, calls = calls_of(target, windows[:size])
    of = [kind_of(*pair) for pair in zip(layers, calls, strict=True)]
    forward, reading = 0.0, 0.0
    for kind, count in Counter(of).items():
        index = of.index(kind)
        began = time.perf_counter()
        with target.layer(index) as layer, torch.no_grad(), settings.matmuls(target.device):
            reading += count * (time.perf_counter() - began)
            seconds: list[float] = []
            while len(seconds) < CALLS and sum(seconds) < LONG:
                began = time.perf_counter()
                call_layer(layer, hidden, calls[index])
                if target.device.type == "cuda":
                    torch.cuda.synchronize(target.device)
                seconds.append(time.perf_counter() - began)
        forward += count * median(seconds)
    return LayerTimes(forward / (hidden.shape[0] * hidden.shape[1]), reading)


def read_seconds(target: Target, index: int) -> float:
    """Seconds to read one layer."""
    began = time.perf_counter()
    with target.layer(index):
        return time.perf_counter() - began
