"""Cubic: fast at the beginning, slow at the end."""

from __future__ import annotations

from secateur.sparsity.schedules import Span, schedules


@schedules.register("cubic")
class Cubic(Span):
    """s(p) = s_last + (s_first − s_last) · (1 − p)³.

    Paper: Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv:1710.01878, with p = (t − t₀) / (n Δt).

    Example:
        >>> from secateur.sparsity.schedules.cubic import Cubic
        >>> [round(Cubic(0.8)(done), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """

    def __call__(self, done: float) -> float:
        """The sparsity when this share of the steps is done."""
        return self.last + (self.first - self.last) * (1 - done) ** 3
