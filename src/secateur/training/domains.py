"""Dynamic batch loading: more text of the kinds in which the model lags behind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateur.errors import NumericalError, RecipeError
from secateur.types import Windows

__all__ = ["DomainLoading"]


class DomainLoading:
    """Proportions of data domains that follow their losses:

        w_d ← w_d · exp(max(loss_d − reference_d, 0)),  then Σ w = 1

    Paper: Xia et al. 2023, "Sheared LLaMA", arXiv:2310.06694, where the reference is the loss the
    model is expected to reach in each domain; that of the dense model is a plain choice.

    Args:
        windows: token ids [samples, sequence_length] of each domain.
        references: a loss for each domain, in nats per token.
        seed: of the draws.
        proportions: to begin with; by default as many windows as there are.

    Raises:
        RecipeError: domains and references do not match, a domain is empty, or a proportion is
            not positive.
    """

    def __init__(
        self,
        windows: Mapping[str, Windows],
        references: Mapping[str, float],
        seed: int = 0,
        proportions: Mapping[str, float] | None = None,
    ) -> None:
        first = dict(proportions or {name: float(len(ids)) for name, ids in windows.items()})
        if not windows or set(windows) != set(references) or set(windows) != set(first):
            raise RecipeError(
                f"domains {sorted(windows)}, references {sorted(references)}, "
                f"proportions {sorted(first)}",
                remedy="name the same domains in each, at least one",
            )
        wrong = [n for n, ids in windows.items() if not len(ids) or not first[n] > 0]
        if wrong:
            raise RecipeError(
                f"domain {wrong[0]!r} has {len(windows[wrong[0]])} windows and proportion "
                f"{first[wrong[0]]}",
                remedy="leave it out, or give it text and a positive proportion",
            )
        self.windows, self.references = dict(windows), dict(references)
        self.proportions = _normalised(first)
        self.random = torch.Generator().manual_seed(seed)
        self.waiting: dict[str, list[int]] = {name: [] for name in windows}

    def update(self, losses: Mapping[str, float]) -> None:
        """Follow the losses on held-out text of each domain.

        Raises:
            NumericalError: a loss is not a number.
        """
        for name in self.windows:
            if not math.isfinite(losses[name]):
                raise NumericalError(f"the loss of domain {name!r} is {losses[name]}")
        excess = {n: max(losses[n] - self.references[n], 0.0) for n in self.windows}
        most = max(excess.values())  # the same factor for all, so that exp cannot overflow
        self.proportions = _normalised(
            {n: w * math.exp(excess[n] - most) for n, w in self.proportions.items()}
        )

    def batches(self, size: int, steps: int) -> Iterator[Tensor]:
        """Batches [size, sequence_length], each window's domain drawn by the proportions of now.

        Within a domain all windows are seen once before any is seen again.
        """
        names = list(self.windows)
        for _ in range(steps):
            weights = torch.tensor([self.proportions[n] for n in names], dtype=torch.float64)
            chosen = torch.multinomial(weights, size, replacement=True, generator=self.random)
            yield torch.stack([self._next(names[i]) for i in chosen.tolist()])

    def _next(self, name: str) -> Tensor:
        """The next window of a domain."""
        if not self.waiting[name]:
            count = len(self.windows[name])
            self.waiting[name] = torch.randperm(count, generator=self.random).tolist()
        return self.windows[name][self.waiting[name].pop()]


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
