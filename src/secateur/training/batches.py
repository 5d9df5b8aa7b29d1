"""The windows of tokens that a step of training reads, each full, in an order drawn by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Batches", "Order"]


@dataclass(frozen=True)
class Batch:
    """Some windows.

    Attributes:
        ids: token ids [windows, length].
        numbers: their places in the training text.
    """

    ids: Tensor
    numbers: tuple[int, ...]


class Order(Protocol):
    """Another order of the windows than that of epochs."""

    def numbers(self, step: int) -> tuple[int, ...]:
        """The windows of a step, counted from 0; steps are read one after the other."""
        ...


@dataclass(frozen=True)
class Batches:
    """The windows of every step.

    Each epoch reads all windows once, in an order of its own. A step may reach into the next epoch.
    The windows of a step depend on the seed and its number alone, so a resumed run reads the same.

    Args:
        windows: token ids [windows, length].
        size: windows in a step.
        seed: of the orders.
        chosen: an order that takes the place of epochs; None for epochs.
    """

    windows: Tensor
    size: int
    seed: int = 0
    chosen: Order | None = None

    def numbers(self, step: int) -> tuple[int, ...]:
        """The windows of a step, counted from 0."""
        if self.chosen is not None:
            return self.chosen.numbers(step)
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
            device: of the ids.
            rank: the number of this process.
            ranks: how many processes share the step.
        """
        mine = self.numbers(step)[rank::ranks]
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [Batch(self.windows[list(part)].to(device), part) for part in parts]
