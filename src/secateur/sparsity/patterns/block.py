"""Blocks: rectangles of weights are kept or pruned as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import PatternError, ShapeError
from secateur.registry import float32_bytes
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import check_sparsity, patterns, pruned_count, unit_scores, within
from secateur.types import Mask, Score, UnitScores


@patterns.register("block")
@dataclass(frozen=True)
class Block:
    """Prunes the blocks of `rows` outputs x `columns` inputs with the lowest sum of scores.

    The number of blocks pruned is the whole number nearest to the sparsity.

    Args:
        rows: outputs in a block.
        columns: inputs in a block.
        scope: `layer`: all blocks of a matrix compete; `global`: those of the model, where
            `allocation.global_threshold` has found how many each matrix loses, so that a single
            matrix is treated as with `layer`.

    Raises:
        PatternError: a side is below 1, or there is no such scope.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns.block import Block
        >>> Block(1, 2).mask(torch.tensor([[1.0, 9.0, 4.0, 3.0]]), 0.5)
        tensor([[ True,  True, False, False]])
    """

    rows: int
    columns: int
    scope: str = "layer"

    written: ClassVar[str] = "ROWSxCOLUMNS for blocks, for example '16x1', '32x32'"
    sparsity = None
    scopes = ("layer", "global")
    whole_units = False
    batched = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PatternError(
                f"a block of {self.name} has no weights", remedy="give sides of 1 or more"
            )
        if self.scope == "row":
            raise PatternError(
                f"blocks of {self.name} cannot compete within a row: a block spans "
                f"{self.rows} row(s), and a row has few blocks",
                remedy="use scope 'layer' or 'global'",
            )
        if self.scope not in self.scopes:
            raise PatternError(
                f"blocks have no scope {self.scope!r}", remedy="use scope 'layer' or 'global'"
            )

    @classmethod
    def parse(cls, text: str, scope: str | None) -> Block | None:
        """Read rows x columns, for example `16x1`; None for any other text.

        Raises:
            PatternError: a side is 0, or the scope is not `layer` or `global`.
        """
        written = re.fullmatch(r"(\d+)x(\d+)", text)
        if written is None:
            return None
        return cls(int(written[1]), int(written[2]), "layer" if scope is None else scope)

    @property
    def name(self) -> str:
        """As written in a recipe: rows x columns."""
        return f"{self.rows}x{self.columns}"

    @property
    def columns_together(self) -> int:
        """The width of a block."""
        return self.columns

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise PatternError for a sparsity outside [0, 1), ShapeError if blocks do not tile."""
        check_sparsity(sparsity, self.scope)
        if shape[0] % self.rows or shape[1] % self.columns:
            raise ShapeError(
                f"blocks of {self.name} do not tile this matrix of {shape[0]} outputs x "
                f"{shape[1]} inputs",
                remedy="leave this matrix out, or choose sides that divide its sizes",
            )

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The number of zeros in a matrix [out, in]: those of the nearest number of blocks."""
        blocks = (shape[0] // self.rows) * (shape[1] // self.columns)
        return pruned_count(blocks, sparsity) * self.rows * self.columns

    def step(self, shape: tuple[int, int]) -> int:
        """The weights of a block."""
        return self.rows * self.columns

    def units(self, score: Score) -> UnitScores:
        """The sum of the scores of each block, float32 [..., out / rows, in / columns]."""
        # [..., out / rows, rows, in / columns, columns]
        tiles = score.unflatten(-1, (-1, self.columns)).unflatten(-3, (-1, self.rows))
        return tiles.sum(dim=(-3, -1))

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask [out, in]; on a tie the block with the lower index is pruned.

        Raises:
            ShapeError: the blocks do not tile the matrix.
            PatternError: the sparsity is outside [0, 1).
            NumericalError: the score of a block is NaN.
        """
        *_, rows, columns = score.shape
        self.check((rows, columns), sparsity)
        blocks = unit_scores(self.units, score, allowed)
        competing = blocks.reshape(-1, rows * columns // (self.rows * self.columns))
        count = pruned_count(competing.shape[1], sparsity)
        kept = keep_largest(competing, count).reshape(blocks.shape)
        kept = kept.repeat_interleave(self.rows, -2).repeat_interleave(self.columns, -1)
        return within(kept, allowed)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """One float32 copy of the scores."""
        return float32_bytes(shape)
