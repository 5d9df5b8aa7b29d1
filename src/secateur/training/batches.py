"""The token windows that each training step reads. All are full; a seed sets their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A few windows of the training text.

    Attributes:
        ids: token ids [windows, length].
        numbers: their positions in the training text.
    """

    ids: Tensor
    numbers: tuple[int, ...]


class Order(Protocol):
    """An order of the windows that replaces epochs."""

    def numbers(self, step: int) -> tuple[int, ...]:
        """Return the windows of a step, counted from 0. The loop reads the steps in order."""
        ...


@dataclass(frozen=True)
class Batches:
    """The windows of every step.

    Each epoch reads all windows once, in its own order. A step may reach into the next epoch.
    The windows of a step depend only on the seed and the step number, so a resumed run reads
    the same windows.

    Args:
        windows: token ids [windows, length].
        size: number of windows in a step.
        seed: seed of the orders.
        chosen: an order that replaces epochs; None for epochs.
    """

    windows: Tensor
    size: int
    seed: int = 0
    chosen: Order | None = None

    def numbers(self, step: int) -> tuple[int, ...]:
        """Return the windows of a step, counted from 0."""
        if self.chosen is not None:
            return self.chosen.numbers(step)
        count = len(self.windows)
        places = range(step * self.size, (step + 1) * self.size)
        orders = {p // count: self.order(p // count) for p in (places[0], places[-1])}
        return tuple((orders.get(p // count) or self.order(p // count))[p % count] for p in places)

    def order(self, epoch: int) -> list[int]:
        """Return the order of the windows in an epoch."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.windows), generator=draw).tolist()
        return order

    def micro(
        self, step: int, size: int, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """Yield the windows of a step in parts; the loop runs one part at a time.

        Args:
            step: counted from 0.
            size: maximum number of windows in a part.
            device: where the ids go.
            rank: rank of this process.
            ranks: how many processes share the step.
        """
        mine = self.numbers(step)[rank::ranks]
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [Batch(self.windows[list(part)].to(device), part) for part in parts]
