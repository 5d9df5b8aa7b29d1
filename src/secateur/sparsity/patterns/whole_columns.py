"""Whole columns: units that nothing reads any more can be cut out of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import PatternError, ShapeError
from secateur.registry import float32_bytes
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import patterns, pruned_count, unit_scores, within
from secateur.types import Mask, Score, UnitScores


@patterns.register("whole-columns")
@dataclass(frozen=True)
class WholeColumns:
    """Prunes groups of `width` consecutive columns, in all rows, with the lowest sum of scores.

    In the linear that reads the neurons of a feed-forward block, a group of 1 is a neuron. In the
    linear that reads attention's outputs, a group as wide as a KV group's query heads is that KV
    group. The number of pruned groups is the multiple of `multiple` nearest to the sparsity. All
    groups may be pruned; then the linear adds nothing. With `among`, groups compete only within
    sets of so many consecutive ones, and each set loses the same number. So query heads are groups
    as wide as a head, among those of a KV group.

    Args:
        width: consecutive columns that are pruned together.
        multiple: groups are pruned, and so kept, in multiples of this number.
        among: number of consecutive groups that compete; 0 for all.

    Raises:
        PatternError: a number is too small, or `multiple` and `among` are both given.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns.whole_columns import WholeColumns
        >>> WholeColumns(1).mask(torch.tensor([[1.0, 5.0], [6.0, 1.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])
    """

    width: int
    multiple: int = 1
    among: int = 0

    written: ClassVar[str] = (
        "*xWIDTH for whole columns, for example '*x64', or '*x64@3' for as many of each three"
    )
    sparsity = None
    scope = "layer"
    scopes = ("layer",)
    whole_units = True
    batched = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.multiple < 1 or self.among < 0:
            raise PatternError(
                f"{self.name} prunes no columns", remedy="give numbers of 1 or more, such as '*x64'"
            )
        if self.multiple > 1 and self.among:
            raise PatternError(
                f"{self.name} has a multiple and groups that compete", remedy="give one of them"
            )

    @classmethod
    def parse(cls, text: str, scope: str | None) -> WholeColumns | None:
        """Read `*xWIDTH`, `*xWIDTH/MULTIPLE` or `*xWIDTH@AMONG`; None for any other text.

        Raises:
            PatternError: a number is 0, or the scope is not `layer`.
        """
        written = re.fullmatch(r"\*x(\d+)(?:/(\d+)|@([1-9]\d*))?", text)
        if written is None:
            return None
        if scope not in (None, "layer"):
            raise PatternError(
                f"whole columns have no scope {scope!r}",
                remedy="leave the scope out; an allocation compares linears",
            )
        return cls(int(written[1]), int(written[2] or 1), int(written[3] or 0))

    @property
    def name(self) -> str:
        """As written in a recipe."""
        competing = f"@{self.among}" if self.among else ""
        return f"*x{self.width}" + (f"/{self.multiple}" if self.multiple > 1 else competing)

    @property
    def columns_together(self) -> int:
        """The width of all groups that depend on each other."""
        return self.width * (self.among or self.multiple)

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise PatternError for a sparsity outside [0, 1], ShapeError if groups do not tile."""
        if not 0 <= sparsity <= 1:
            raise PatternError(
                f"sparsity is {sparsity}", remedy="give the fraction of columns to prune, 0 to 1"
            )
        if shape[1] % self.columns_together:
            tiles = self.columns_together // self.width
            together = f", {tiles} together," if tiles > 1 else ""
            raise ShapeError(
                f"groups of {self.width} columns{together} do not tile this matrix of {shape[1]} "
                "inputs",
                remedy="leave this matrix out, or choose numbers that divide its inputs",
            )

    def units_pruned(self, inputs: int, sparsity: float) -> int:
        """How many groups of a matrix with so many inputs are pruned."""
        groups = inputs // self.width
        if self.among:
            return pruned_count(self.among, sparsity) * (groups // self.among)
        return pruned_count(groups // self.multiple, sparsity) * self.multiple

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The number of zeros in a matrix [out, in]."""
        return self.units_pruned(shape[1], sparsity) * self.width * shape[0]

    def step(self, shape: tuple[int, int]) -> int:
        """The weights of the groups that are pruned together."""
        together = shape[1] // self.columns_together if self.among else self.multiple
        return shape[0] * self.width * together

    def units(self, score: Score) -> UnitScores:
        """|Σ of the scores of each group|, float32 [..., 1, in / width]; few scores have signs."""
        # The magnitude last: contributions within a unit may cancel (`coupled-taylor`).
        return score.sum(-2).unflatten(-1, (-1, self.width)).sum(-1).abs()[..., None, :]

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask [out, in]; on a tie the group with the lower index is pruned.

        Raises:
            ShapeError: the groups do not tile the matrix.
            PatternError: the sparsity is outside [0, 1].
            NumericalError: the score of a group is NaN.
        """
        *_, rows, columns = score.shape
        self.check((rows, columns), sparsity)
        groups = unit_scores(self.units, score, allowed)
        # A competition for each set; without sets, one for each matrix.
        parts = groups.reshape(-1, self.among or groups.shape[-1])
        sets = groups.shape[-1] // parts.shape[1]
        kept = keep_largest(parts, self.units_pruned(columns, sparsity) // sets)
        # One row of units becomes the columns, then all rows alike.
        kept = kept.view(groups.shape).repeat_interleave(self.width, -1).expand(score.shape)
        return within(kept, allowed).contiguous()

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """One float32 copy of the scores."""
        return float32_bytes(shape)
