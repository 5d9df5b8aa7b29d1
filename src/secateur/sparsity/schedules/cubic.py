"""Cubic: fast at the beginning, slow at the end."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.sparsity.schedules import check_span, schedules


@schedules.register("cubic")
@dataclass(frozen=True)
class Cubic:
    """s(p) = s_last + (s_first − s_last) · (1 − p)³.

    Paper: Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv:1710.01878, with p = (t − t₀) / (n Δt).

    Args:
        last: the sparsity at the end, at least 0 and below 1.
        first: the sparsity at the beginning.

    Raises:
        RecipeError: a sparsity is out of range, or the last is below the first.

    Example:
        >>> from secateur.sparsity.schedules.cubic import Cubic
        >>> [round(Cubic(0.8)(done), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """

    last: float
    first: float = 0.0

    def __post_init__(self) -> None:
        check_span(self.first, self.last)

    def __call__(self, done: float) -> float:
        """The sparsity when this share of the steps is done."""
        return self.last + (self.first - self.last) * (1 - done) ** 3
