"""Chooses the learning rate of a distillation by short trials.

    a trial:    the pruned model learns for a quarter of the steps, at most 64, with a whole course
                of the rate
    its loss:   the mean over a few windows that no trial reads
    the rates:  the highest, a quarter of it, and further down by quarters while the loss falls

The best rate depends on how much a model has lost: what repairs a model that lost much hurts one
that lost little, because Adam moves every weight by about the rate, however small the gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from secateur.errors import NumericalError

__all__ = ["MOST_JUDGING", "RateTrials", "held_out", "trial_steps"]

FEWEST_WINDOWS = 8
"""With fewer windows nothing is held out, and the highest rate is taken."""

MOST_JUDGING = 8
"""The most windows that judge the trials. They are the last ones, which the statistics have not
read where a text was given."""

LOWEST = 1 / 64
"""The lowest rate, as a fraction of the highest."""


def held_out(windows: int) -> int:
    """Return how many of the last windows judge the trials; 0 for no trials."""
    return 0 if windows < FEWEST_WINDOWS else min(MOST_JUDGING, windows // 4)


def trial_steps(steps: int) -> int:
    """Return the number of steps of a trial.

    Noise harms within a few steps, and learning takes many, so shorter trials choose too low rates:
    16 steps in place of 48 chose a quarter of the best (gemma of `benchmarks/bench_models.py`).
    """
    return max(1, min(64, steps // 4))


@dataclass(frozen=True)
class RateTrials:
    """The trials of one training.

    Args:
        train: trains for some steps at a rate.
        judge: returns the loss on the windows that are held out.
        reset: puts the weights back with which the training begins.
    """

    train: Callable[[float], None]
    judge: Callable[[], float]
    reset: Callable[[], None]

    def choose(self, highest: float) -> float:
        """Return the rate with the lowest loss; the weights are reset.

        Args:
            highest: the first rate.

        Example:
            >>> from secateur.workflows.prune.chosen_rate import RateTrials
            >>> tried = []
            >>> RateTrials(tried.append, lambda: abs(tried[-1] - 0.06), lambda: None).choose(1.0)
            0.0625
            >>> tried
            [1.0, 0.25, 0.0625, 0.015625]
        """
        rate, loss = highest, self.loss(highest)
        while rate > LOWEST * highest:
            lower = self.loss(rate / 4)
            if lower >= loss and math.isfinite(loss):
                break
            rate, loss = rate / 4, lower
        return rate

    def loss(self, rate: float) -> float:
        """Return the loss after a trial; infinite if the training is lost at this rate."""
        try:
            self.train(rate)
            return self.judge()
        except NumericalError:
            return math.inf
        finally:
            self.reset()
