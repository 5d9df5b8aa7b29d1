"""Chooses the learning rate of a distillation by short trials.

    a trial:     the pruned model learns for T of the S steps, with a whole course of the rate;
                 T = S/4, at most 64
    its loss:    the mean over a few windows that no trial reads
    its rate:    T/S of the highest, a quarter of that, and further down while the loss falls
    the choice:  S/T times the rate of the best trial

The best rate depends on how much a model has lost: what repairs a model that lost much hurts one
that lost little, because Adam moves every weight by about the rate, however small the gradient is.
It also depends on the number of steps. The noise of the gradients moves every weight once by about
the rate, and this harm does not grow with the steps. What is learned grows by the rate in each
step. So the best rate of S steps is about S/T times that of T steps (docs/methods/distillation.md).

In sweeps (`sweeps.py`) the trials have sweeps over as many windows as the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from secateur.errors import NumericalError

FEWEST_WINDOWS = 8
"""With fewer windows nothing is held out, and the highest rate is taken."""

MOST_JUDGING = 8
"""The most windows that judge the trials. They are the last ones, which the statistics have not
read where a text was given."""

LOWEST = 1 / 64
"""The lowest choice, as a fraction of the highest."""


def held_out(windows: int) -> int:
    """Return how many of the last windows judge the trials; 0 for no trials."""
    return 0 if windows < FEWEST_WINDOWS else min(MOST_JUDGING, windows // 4)


def trial_steps(steps: int) -> int:
    """Return the number of steps of a trial."""
    return max(1, min(64, steps // 4))


@dataclass(frozen=True)
class RateTrials:
    """The trials of one training.

    Args:
        train: trains at a rate, for some steps.
        judge: returns the loss on the windows that are held out.
        reset: puts the weights back with which the training begins.
        steps: number of steps of the training.
    """

    train: Callable[[float, int], None]
    judge: Callable[[], float]
    reset: Callable[[], None]
    steps: int

    def choose(self, highest: float) -> float:
        """Return the rate of the training; the weights are reset.

        Args:
            highest: the highest choice.

        Example:
            >>> from secateur.workflows.prune.chosen_rate import RateTrials
            >>> tried = []
            >>> train = lambda rate, steps: tried.append(rate)
            >>> loss = lambda: abs(tried[-1] - 0.01)
            >>> RateTrials(train, loss, lambda: None, steps=512).choose(1.0)
            0.0625
            >>> tried
            [0.125, 0.03125, 0.0078125, 0.001953125]
        """
        longer = self.steps / trial_steps(self.steps)
        rate, loss = highest, self.loss(highest / longer)
        while rate > LOWEST * highest:
            lower = self.loss(rate / 4 / longer)
            if lower >= loss and math.isfinite(loss):
                break
            rate, loss = rate / 4, lower
        return rate

    def loss(self, rate: float) -> float:
        """Return the loss after a trial; infinite if the training is lost at this rate."""
        try:
            self.train(rate, trial_steps(self.steps))
            return self.judge()
        except NumericalError:
            return math.inf
        finally:
            self.reset()
