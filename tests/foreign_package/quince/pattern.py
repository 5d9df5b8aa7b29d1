"""Pairs of neighbouring inputs are kept or pruned together."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quince import MIB
from secateur.errors import PatternError, ShapeError
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import check_sparsity, patterns, pruned_count, unit_scores, within
from secateur.types import Mask, Score


@patterns.register("quince-pairs")
@dataclass(frozen=True)
class Pairs:
    """Prunes as many pairs of neighbouring inputs in every row."""

    written: ClassVar[str] = "pairs: two neighbouring inputs of a row together"
    name: ClassVar[str] = "pairs"
    scope: ClassVar[str] = "row"
    scopes: ClassVar[tuple[str, ...]] = ("row",)
    columns_together: ClassVar[int] = 2
    sparsity: ClassVar[float | None] = None
    whole_units: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str, scope: str | None) -> "Pairs | None":
        """Read `pairs`; None for any other text."""
        if text != "pairs":
            return None
        if scope not in (None, "row"):
            raise PatternError(f"pairs have no scope {scope!r}", remedy="leave the scope out")
        return cls()

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Refuse an odd number of inputs, and a sparsity outside [0, 1)."""
        check_sparsity(sparsity, self.scope)
        if shape[1] % 2:
            raise ShapeError(f"{shape[1]} inputs are not pairs", remedy="leave this matrix out")

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The number of zeros in a matrix [out, in]."""
        return shape[0] * 2 * pruned_count(shape[1] // 2, sparsity)

    def step(self, shape: tuple[int, int]) -> int:
        """One pair of each row."""
        return 2 * shape[0]

    def units(self, score: Score) -> Tensor:
        """The sum of the scores of each pair, float32 [out, in / 2]."""
        return score.unflatten(1, (-1, 2)).sum(2)

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask [out, in]; on a tie the pair with the lower index is pruned."""
        rows, columns = score.shape
        self.check((rows, columns), sparsity)
        pairs = unit_scores(self.units, score, allowed)
        kept = keep_largest(pairs, pruned_count(columns // 2, sparsity))
        return within(kept.repeat_interleave(2, 1), allowed)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """8 MiB."""
        return 8 * MIB
