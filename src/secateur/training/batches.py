"""What a step of training reads: windows of tokens, each full, in an order drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Batches"]


@dataclass(frozen=True)
class Batch:
    """Some windows.

    Attributes:
        ids: token ids [windows, length].
        numbers: which windows of the training text they are.
    """

    ids: Tensor
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Batches:
    """The windows of every step. Each epoch sees all windows once, in an order of its own; a step
    may reach into the next epoch. What a step reads depends on the seed and its number alone, so
    a run that goes on after a stop reads what it would have read.

    Args:
        windows: token ids [windows, length].
        size: windows in a step.
        seed: of the orders.
    """

    windows: Tensor
    size: int
    seed: int = 0

    def numbers(self, step: int) -> tuple[int, ...]:
        """The windows of a step, counted from 0."""
        count = len(self.windows)
        places = range(step * self.size, (step + 1) * self.size)
        orders = {p // count: self.order(p // count) for p in (places[0], places[-1])}
        return tuple((orders.get(p // count) or self.order(p // count))[p % count] for p in places)

    def order(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.windows), generator=draw).tolist()
        return order

    def micro(
        self, step: int, size: int, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """A step in parts that run one after the other.

        Args:
            step: counted from 0.
            size: windows in a part, at most.
            device: where the ids go.
            rank: which of several processes this is.
            ranks: how many share the step.
        """
        mine = self.numbers(step)[rank::ranks]
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [Batch(self.windows[list(part)].to(device), part) for part in parts]
