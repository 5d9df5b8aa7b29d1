"""Shared by tuning a layer and distilling a model: steps, learning rate, temporary float32."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def draw_steps(windows: int, size: int, passes: int, seed: int) -> list[list[int]]:
    """Return the windows of every step. Each pass reads all windows once, in its own order.

    Args:
        windows: number of windows.
        size: number of windows in a step; the last step of a pass may have fewer.
        passes: number of passes over all windows.
        seed: seed of the orders.
    """
    draw = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(passes):
        order = torch.randperm(windows, generator=draw).tolist()
        steps += [order[i : i + size] for i in range(0, windows, size)]
    return steps


def half_cosine(step: int, steps: int) -> float:
    """The factor of the learning rate: 1 at step 0, falling to 0 after the last of `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def in_float32(module: nn.Module, tuned: Collection[str]) -> Iterator[None]:
    """Hold floating parameters of a module in float32; only tuned ones get gradients.

    Parameters are tracked by name, so a parameter that is replaced in the meantime can be freed.

    Args:
        module: afterwards its parameters have their old dtypes and `requires_grad`, and no
            gradients.
        tuned: names of the parameters that get gradients.
    """
    before = {
        name: (p.dtype, p.requires_grad)
        for name, p in module.named_parameters()
        if p.is_floating_point()
    }
    to_float32(module)
    for name in before:
        module.get_parameter(name).requires_grad_(name in tuned)
    try:
        yield
    finally:
        for name, (dtype, wanted_gradient) in before.items():
            p = module.get_parameter(name)
            p.grad = None
            if p.dtype != dtype:
                p.data = p.data.to(dtype)
            p.requires_grad_(wanted_gradient)


def to_float32(module: nn.Module) -> None:
    """Convert floating parameters of a module to contiguous float32, in place.

    torch's fused Adam reads and writes the memory of a parameter as if it were contiguous. The
    weights of experts that are stored transposed or interleaved are not.
    """
    for p in module.parameters():
        if p.is_floating_point() and not (p.dtype == torch.float32 and p.is_contiguous()):
            p.data = p.data.float().contiguous()
