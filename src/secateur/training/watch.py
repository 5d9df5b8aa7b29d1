"""Monitors a training: the losses of its steps, and the loss on held-out text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from secateur.training.batches import Batch

WATCHED = 10
"""Number of steps in one median."""
SUSPECT, NOISE = 1.5, 0.1

Objective = Callable[[Any, Batch], Tensor]


class DivergenceWatch:
    """Finds a training that diverges.

    Let m be the median of the last 10 losses. A training diverges when

        m_now > limit · min(m so far) + 0.1 · loss_1

    The last term lets a loss near 0 vary.

    Args:
        limit: factor of the lowest median; 0 sets no limit.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.lowest = self.latest = math.inf
        self.watched = 0

    def fault(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Read the new lines of the log. Return a description of the divergence, or None.

        Args:
            log: one line for each step, with `loss`.
        """
        for end in range(max(WATCHED, self.watched + 1), len(log) + 1):
            self.latest = statistics.median(line["loss"] for line in log[end - WATCHED : end])
            self.lowest, self.watched = min(self.lowest, self.latest), end
        if not self.watched or not self.limit:
            return None
        if self.latest <= self.limit * self.lowest + NOISE * log[0]["loss"]:
            return None
        return (
            f"the loss has risen from {self.lowest:.3g} to {self.latest:.3g} (medians of {WATCHED} "
            "steps): training diverges"
        )

    def is_suspicious(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last loss is so high that the training may diverge soon."""
        if not self.watched or not self.limit:
            return False
        allowed: float = SUSPECT * self.lowest + NOISE * log[0]["loss"]
        return bool(log[-1]["loss"] > allowed)


@torch.no_grad()
def mean_loss(
    model: Any,
    objective: Objective,
    windows: Tensor,
    at_once: int,
    matmuls: Callable[[], AbstractContextManager[Any]],
) -> float:
    """The mean loss over windows.

    Args:
        model: a causal language model.
        objective: the loss of a batch; a mean over its windows.
        windows: token ids [windows, length], on any device.
        at_once: number of windows in one forward.
        matmuls: returns a context that sets the precision of products.
    """
    device, total = next(model.parameters()).device, 0.0
    for ids in windows.split(at_once):
        with matmuls():
            total += objective(model, Batch(ids.to(device), ())).item() * len(ids)
    return total / len(windows)
