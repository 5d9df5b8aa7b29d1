"""The schedules of the literature."""

from secateur.sparsity.schedules import schedule


@schedule
def one_shot(done: float, *, last: float) -> float:
    """s(p) = s_last at every p, 0 as well: pruned before the first step of training.

    Example:
        >>> from secateur.sparsity.schedules.formulas import one_shot
        >>> [one_shot(done, last=0.8) for done in (0.0, 0.5, 1.0)]
        [0.8, 0.8, 0.8]
    """
    return last


@schedule
def linear(done: float, *, first: float, last: float) -> float:
    """s(p) = s_last + (s_first − s_last) · (1 − p): the same amount at every step.

    Example:
        >>> from secateur.sparsity.schedules.formulas import linear
        >>> [round(linear(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    return last + (first - last) * (1 - done)


@schedule
def cubic(done: float, *, first: float, last: float) -> float:
    """s(p) = s_last + (s_first − s_last) · (1 − p)³: fast at the beginning, slow at the end.

    Paper: Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv:1710.01878, with p = (t − t₀) / (n Δt).

    Example:
        >>> from secateur.sparsity.schedules.formulas import cubic
        >>> [round(cubic(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    return last + (first - last) * (1 - done) ** 3


@schedule
def geometric(done: float, *, first: float, last: float) -> float:
    """s(p) = 1 − (1 − s_first) · ((1 − s_last) / (1 − s_first))^p: the same share of what is left.

    In n rounds, each prunes the fraction 1 − ((1 − s_last) / (1 − s_first))^(1/n) of the weights
    that are left: 33 % of them in each of 4 rounds to 80 %.

    Paper: the rounds of iterative magnitude pruning, Frankle and Carbin 2019, "The Lottery Ticket
    Hypothesis", arXiv:1803.03635, who prune 20 % of what is left. Deviation: the number of rounds
    determines the fraction, so that the last round ends exactly at the target sparsity.

    Example:
        >>> from secateur.sparsity.schedules.formulas import geometric
        >>> [round(geometric(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.331, 0.553, 0.701, 0.8]
    """
    if done == 1:  # 1 − (1 − s) is not s in every last bit, and the end is promised exactly
        return last
    left = (1 - last) / (1 - first)
    return min(1 - (1 - first) * left**done, last)
