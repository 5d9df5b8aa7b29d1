"""One-shot: everything at once."""

from __future__ import annotations

from secateur.sparsity.schedules import Span, schedules


@schedules.register("one-shot")
class OneShot(Span):
    """s(p) = s_last at every p, 0 as well: pruned before the first step of training.

    The first sparsity is ignored.

    Example:
        >>> from secateur.sparsity.schedules.one_shot import OneShot
        >>> [OneShot(0.8)(done) for done in (0.0, 0.5, 1.0)]
        [0.8, 0.8, 0.8]
    """

    def __call__(self, done: float) -> float:
        """The last sparsity."""
        return self.last
