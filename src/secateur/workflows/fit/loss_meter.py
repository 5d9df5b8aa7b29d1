"""Measures the loss of the next token of candidates, on windows that others did not see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.choose.budgeted import Cost
from secateur.engine.choose.fitting import FitLevel, FitSearch
from secateur.engine.choose.tournament import Lockstep, Tournament, fingerprint
from secateur.engine.choose.values import StoredVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate
from secateur.workflows.fit.ground import Ground

BISECTIONS = 6


@dataclass(frozen=True)
class LossMeter:
    """The loss of candidates on some windows.

    Attributes:
        tournament: measures, or reads what was measured.
        tokens: of the windows.
        linears: how many a candidate has.
    """

    tournament: Tournament
    tokens: int
    linears: int

    @classmethod
    def on(
        cls,
        windows: Tensor,
        ground: Ground,
        names: Sequence[str],
        levels: Sequence[FitLevel],
        file: Path,
    ) -> LossMeter:
        """A meter on windows.

        Args:
            windows: token ids [windows, length].
            ground: of the fit.
            names: of the linears; a candidate has a level for each.
            levels: the levels; 0 is the model itself.
            file: of the measured values.
        """
        ends = ModelEnds(ground.target, windows)
        variants = StoredVariants(ends, names, [one.level for one in levels])
        told = fingerprint(ends, windows.numel(), "loss", names)
        lockstep = Lockstep(ends, variants, "loss", ground.progress)
        measure = Tournament(lockstep, variants.versions, file, told)
        return cls(measure, windows.numel(), len(names))

    @torch.no_grad()
    def loss(self, candidate: Candidate) -> float:
        """The mean loss of the next token, in nats."""
        (found,) = self.tournament([candidate], self.tokens, 0)
        return found

    def rise(self, candidate: Candidate) -> float:
        """The loss above that of the model itself."""
        return self.loss(candidate) - self.loss((0,) * self.linears)


def smallest_within(
    search: FitSearch, meter: LossMeter, bound: float, aim: Cost, progress: Progress
) -> float:
    """The smallest size found, by bisection, whose loss rises by no more than a bound.

    Args:
        search: after the survey; its predictions choose a candidate for each cost.
        meter: on the windows that choose.
        bound: in nats per token.
        aim: the other budgets, and the largest size.
        progress: receives every measured size.

    Returns:
        Bytes of all linears.
    """
    low, high = search.menu.least[0], min(aim[0], search.menu.most[0])
    progress.start("finding the smallest size", BISECTIONS)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        candidate = search.menu.best((middle, *aim[1:]))
        rise = math.inf if candidate is None else meter.rise(candidate)
        low, high = (low, middle) if rise <= bound else (middle, high)
        progress.step(note=f"{middle / 2**20:.1f} MiB of linears: {rise:+.4f}")
    progress.finish()
    return high
