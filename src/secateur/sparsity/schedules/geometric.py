"""Geometric: the same fraction of what remains in every round."""

from __future__ import annotations

from secateur.sparsity.schedules import Span, schedules


@schedules.register("geometric")
class Geometric(Span):
    """s(p) = 1 − (1 − s_first) · ((1 − s_last) / (1 − s_first))^p.

    In n rounds, each prunes the fraction 1 − ((1 − s_last) / (1 − s_first))^(1/n) of the weights
    that are left: 33 % of them in each of 4 rounds to 80 %.

    Paper: the rounds of iterative magnitude pruning, Frankle and Carbin 2019, "The Lottery Ticket
    Hypothesis", arXiv:1803.03635, who prune 20 % of what is left. Deviation: the number of rounds
    determines the fraction, so that the last round ends exactly at the target sparsity.

    Example:
        >>> from secateur.sparsity.schedules.geometric import Geometric
        >>> [round(Geometric(0.8)(done), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.331, 0.553, 0.701, 0.8]
    """

    def __call__(self, done: float) -> float:
        """The sparsity when this share of the steps is done."""
        if done == 1:  # 1 − (1 − s) is not s in every last bit, and the end is promised exactly
            return self.last
        left = (1 - self.last) / (1 - self.first)
        return min(1 - (1 - self.first) * left**done, self.last)
