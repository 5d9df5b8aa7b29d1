"""Linear: the same amount at every step."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.sparsity.schedules import check_span, schedules


@schedules.register("linear")
@dataclass(frozen=True)
class LinearSchedule:
    """s(p) = s_last + (s_first − s_last) · (1 − p).

    Args:
        last: the sparsity at the end, at least 0 and below 1.
        first: the sparsity at the beginning.

    Raises:
        RecipeError: a sparsity is out of range, or the last is below the first.

    Example:
        >>> from secateur.sparsity.schedules.linear import LinearSchedule
        >>> [round(LinearSchedule(0.8)(done), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """

    last: float
    first: float = 0.0

    def __post_init__(self) -> None:
        check_span(self.first, self.last)

    def __call__(self, done: float) -> float:
        """The sparsity when this share of the steps is done."""
        return self.last + (self.first - self.last) * (1 - done)
