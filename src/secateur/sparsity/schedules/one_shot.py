"""One-shot: everything at once."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.sparsity.schedules import check_span, schedules


@schedules.register("one-shot")
@dataclass(frozen=True)
class OneShot:
    """s(p) = s_last at every p, 0 as well: pruned before the first step of training.

    Args:
        last: the sparsity, at least 0 and below 1.
        first: the sparsity before; it is ignored.

    Raises:
        RecipeError: a sparsity is out of range.

    Example:
        >>> from secateur.sparsity.schedules.one_shot import OneShot
        >>> [OneShot(0.8)(done) for done in (0.0, 0.5, 1.0)]
        [0.8, 0.8, 0.8]
    """

    last: float
    first: float = 0.0

    def __post_init__(self) -> None:
        check_span(self.first, self.last)

    def __call__(self, done: float) -> float:
        """The last sparsity."""
        return self.last
