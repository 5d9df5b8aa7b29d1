"""The rows of one matrix, divided among processes that solve them together.

Once the gram is known, the rows of a weight are independent, but for the pattern: with scope
`layer` all weights of the matrix compete. `SharedRows` is the pattern for the rows of one process.
Its thresholds are those of the whole matrix, so all processes together find the mask that one
finds, also under ties.
"""

from __future__ import annotations

import itertools
from typing import Any

from secateur.parallel.ranks import Ranks
from secateur.sparsity.exact_count import keep_largest_of_all
from secateur.sparsity.patterns import Pattern, pruned_count, unit_scores, within
from secateur.types import Mask, Score

ROWS_TOGETHER = 64
"""How many rows stay in one process. With fewer, products of some matrices round in another way
than those of the whole matrix: libraries take rows by 16 at most."""


def row_shares(out_features: int, count: int) -> list[slice]:
    """The rows of each process, whole multiples of 64 but for the last ones.

    Example:
        >>> from secateur.sparsity.shared_rows import row_shares
        >>> row_shares(300, 2)
        [slice(0, 192, None), slice(192, 300, None)]
    """
    units = -(-out_features // ROWS_TOGETHER)
    bounds = [min(-(-units * i // count) * ROWS_TOGETHER, out_features) for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class SharedRows:
    """A pattern for the rows of one process; else it is the pattern of the whole matrix.

    Args:
        pattern: of the whole matrix: unstructured, or one whose rows are independent.
        out_features: the rows of the whole matrix.
        ranks: the processes. All ask for the same masks in the same order.
    """

    batched = False

    def __init__(self, pattern: Pattern, out_features: int, ranks: Ranks) -> None:
        self.pattern, self.out_features, self.ranks = pattern, out_features, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pattern, name)

    @staticmethod
    def suits(pattern: Pattern) -> bool:
        """Whether rows of this pattern can be decided apart, or by one threshold."""
        return pattern.name == "unstructured" or pattern.scope == "group"

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise PatternError or ShapeError if the whole matrix cannot hold this sparsity."""
        self.pattern.check((self.out_features, shape[1]), sparsity)

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The zeros in these columns of the whole matrix."""
        return self.pattern.pruned((self.out_features, shape[1]), sparsity)

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask of the rows of this process, as `Pattern.mask` finds it for the whole matrix."""
        if self.pattern.scope in ("row", "group"):
            return self.pattern.mask(score, sparsity, allowed=allowed)
        self.check((len(score), score.shape[1]), sparsity)
        found = unit_scores(self.pattern.units, score, allowed)
        entries = self.out_features * score.shape[1]
        pruned = pruned_count(entries, sparsity)
        kept = keep_largest_of_all(found.flatten(), entries, pruned, self.ranks)
        return within(kept.view(score.shape), allowed)
