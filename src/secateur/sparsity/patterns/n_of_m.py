"""N:M: N weights kept of every M consecutive ones of a row, as sparse tensor cores read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import PatternError, ShapeError
from secateur.registry import float32_bytes
from secateur.sparsity.exact_count import keep_largest
from secateur.sparsity.patterns import check_sparsity, patterns, unit_scores, within
from secateur.types import Mask, Score


@patterns.register("n:m")
@dataclass(frozen=True)
class NOfM:
    """Keeps the `kept` highest scores of every `group` consecutive input weights.

    N counts the weights that are kept, as NVIDIA does: 1:4 has 75 % zeros. The released code of
    SparseGPT and Wanda counts zeros instead, which is the same only for N = M/2.

    Paper: Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", arXiv:2102.04010.

    Args:
        kept: N.
        group: M.

    Raises:
        PatternError: not 1 <= N < M.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns.n_of_m import NOfM
        >>> NOfM(2, 4).mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 0.5)
        tensor([[False,  True, False,  True]])
        >>> NOfM(1, 4).sparsity
        0.75
    """

    kept: int
    group: int

    written: ClassVar[str] = "N:M, for example '2:4' or '4:8', N kept of M"
    scope = "group"
    scopes = ("group",)
    whole_units = False
    batched = True

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group:
            raise PatternError(
                f"{self.name} would keep {self.kept} of every {self.group} weights",
                remedy="N:M keeps N of M, with 1 <= N < M; for example '2:4', '4:8'",
            )

    @classmethod
    def parse(cls, text: str, scope: str | None) -> NOfM | None:
        """Read `N:M`, for example `2:4`; None for any other text.

        Raises:
            PatternError: not 1 <= N < M, or a scope was given.
        """
        written = re.fullmatch(r"(\d+):(\d+)", text)
        if written is None:
            return None
        pattern = cls(int(written[1]), int(written[2]))
        if scope not in (None, "group"):
            raise PatternError(
                f"{text} cannot have scope {scope!r}: its weights compete within each group of "
                f"{pattern.group}",
                remedy="leave the scope out",
            )
        return pattern

    @property
    def name(self) -> str:
        """As written in a recipe: N:M."""
        return f"{self.kept}:{self.group}"

    @property
    def columns_together(self) -> int:
        """M: a group is decided at once."""
        return self.group

    @property
    def sparsity(self) -> float:
        """1 − N/M, the only sparsity this pattern can have."""
        return 1 - self.kept / self.group

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Raise ShapeError if M does not divide `in`, PatternError for another sparsity."""
        check_sparsity(sparsity, self.scope)
        if abs(sparsity - self.sparsity) > 1e-6:
            raise PatternError(
                f"{self.name} always has sparsity {self.sparsity:g}, not {sparsity:g}",
                remedy="leave the sparsity out, or choose another N:M",
            )
        if shape[1] % self.group:
            raise ShapeError(
                f"{self.name} needs input sizes divisible by {self.group}, but this matrix has "
                f"{shape[1]} inputs ({shape[1]} = {shape[1] // self.group} x {self.group} + "
                f"{shape[1] % self.group})",
                remedy="leave this matrix out, or choose an M that divides its inputs",
            )

    def pruned(self, shape: tuple[int, int], sparsity: float) -> int:
        """The number of zeros in a matrix [out, in]: M − N for every group."""
        return shape[0] * (shape[1] // self.group) * (self.group - self.kept)

    def step(self, shape: tuple[int, int]) -> int:
        """The number of all zeros, because the sparsity is fixed."""
        return self.pruned(shape, self.sparsity)

    def units(self, score: Score) -> Score:
        """Refused: raises PatternError, since weights compete only within their group."""
        raise PatternError(
            f"the weights of {self.name} compete only within each group of {self.group}",
            remedy="a global threshold needs the pattern 'unstructured' or blocks",
        )

    def mask(self, score: Score, sparsity: float, *, allowed: Mask | None = None) -> Mask:
        """The mask [out, in]; on a tie the lower index of a group is pruned.

        Raises:
            ShapeError: M does not divide `in`.
            PatternError: the sparsity is not 1 − N/M.
            NumericalError: a score is NaN.
        """
        *_, rows, columns = score.shape
        self.check((rows, columns), sparsity)
        # A group is M consecutive inputs of one row, so rows and groups are one dimension.
        groups = unit_scores(lambda each: each, score, allowed).reshape(-1, self.group)
        kept = keep_largest(groups, self.group - self.kept).reshape(score.shape)
        return within(kept, allowed)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """One float32 copy of the scores."""
        return float32_bytes(shape)
