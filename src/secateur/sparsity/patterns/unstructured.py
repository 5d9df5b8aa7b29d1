"""Unstructured: any weight may be zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import PatternError
from secateur.registry import did_you_mean, float32_bytes
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import check_sparsity, patterns, pruned_count, unit_scores, within
from secateur.types import Mask, Score


@patterns.register("unstructured")
@dataclass(frozen=True)
class Unstructured:
    """Prunes the lowest scores wherever they are.

    Args:
        scope: what competes with what. `row`: the weights of one output, each row gets the
            same number of zeros; `layer`: all weights of the matrix; `global`: all weights of the
            model, where `allocation.global_threshold` has found how many each matrix loses, so
            that a single matrix is treated as with `layer`.

    Raises:
        PatternError: there is no such scope.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns.unstructured import Unstructured
        >>> score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        >>> Unstructured("row").mask(score, 0.5)
        tensor([[False, False,  True,  True],
                [False, False,  True,  True]])
        >>> Unstructured("layer").mask(score, 0.5)
        tensor([[False, False, False, False],
                [ True,  True,  True,  True]])
    """

    scope: str = "layer"

    written: ClassVar[str] = "'unstructured', with scope row, layer or global"
    name = "unstructured"
    columns_together = 1
    sparsity = None
    scopes = ("row", "layer", "global")
    whole_units = False
    batched = True

    def __post_init__(self) -> None:
        if self.scope not in self.scopes:
            raise PatternError(
                f"unstructured sparsity has no scope {self.scope!r}",
                remedy=did_you_mean(self.scope, list(self.scopes)),
            )

    @classmethod
    def parse(cls, text: str, scope: str | None) -> Unstructured | None:
        """Read `unstructured`; None for any other text.

        Raises:
            PatternError: there is no such scope.
        """
        if text != "unstructured":
            return None
        return cls() if scope is None else cls(scope)

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise PatternError for a sparsity outside [0, 1); every shape fits."""
        check_sparsity(sparsity, self.scope)

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The number of zeros in a matrix [out, in]: the nearest whole number, per row or layer."""
        rows, columns = shape
        if self.scope == "row":
            return rows * pruned_count(columns, sparsity)
        return pruned_count(rows * columns, sparsity)

    def step(self, shape: tuple[int, int]) -> int:
        """One weight, or with scope `row` one of each row."""
        return shape[0] if self.scope == "row" else 1

    def units(self, score: Score) -> Score:
        """The score itself: each weight is pruned for itself."""
        return score

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask [out, in] of the highest scores; on a tie the lower index is pruned.

        Raises:
            PatternError: the sparsity is outside [0, 1).
            NumericalError: a score is NaN.
        """
        *_, rows, columns = score.shape
        self.check((rows, columns), sparsity)
        score = unit_scores(self.units, score, allowed)
        # With `global` the share of this matrix is known already: within it the layer competes.
        competing = score.reshape(-1, columns if self.scope == "row" else rows * columns)
        count = pruned_count(competing.shape[1], sparsity)
        return within(keep_largest(competing, count).reshape(score.shape), allowed)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Two float32 copies of the scores; half of one with scope `row`, in chunks.

        A whole layer takes half a copy in torch, one and a half in numpy.
        """
        copies = float32_bytes(shape)
        return copies // 2 if self.scope == "row" else 2 * copies
