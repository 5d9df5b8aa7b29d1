"""Linear: the same amount at every step."""

from __future__ import annotations

from secateur.sparsity.schedules import Span, schedules


@schedules.register("linear")
class LinearSchedule(Span):
    """s(p) = s_last + (s_first − s_last) · (1 − p).

    Example:
        >>> from secateur.sparsity.schedules.linear import LinearSchedule
        >>> [round(LinearSchedule(0.8)(done), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """

    def __call__(self, done: float) -> float:
        """The sparsity when this share of the steps is done."""
        return self.last + (self.first - self.last) * (1 - done)
