"""Solvers: find the mask and the weights with the least error. One file each.

A solver works in two steps, so that linears with the same input share the costly first one:
`prepare` uses only the statistics of the input, `solve` one weight and its mask. A solver that
declares `batched` also solves the same linear of many experts at once, each as it would alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from secateur.quantization.blocks import TYPES, BlockGrid
from secateur.quantization.groups import BITS, GROUPS, Group, GroupGrid
from secateur.registry import CheckedPart, NonNegative, Registry, one_of
from secateur.sparsity.hessian import relative_output_error
from secateur.sparsity.patterns import Pattern
from secateur.types import Gram, Mask, Statistics, Weight

__all__ = ["ChoosingSolver", "RoundingSolver", "Solution", "Solver", "SolverDefaults", "solvers"]

Bits = Annotated[int | str, one_of(0, *BITS, 8, *TYPES)]
"""Bits of a rounded weight: 2 to 4 in groups, 8 with one scale for each row; 0 not to round. Or a
type of llama.cpp, such as "q4_k"."""


class Solution(NamedTuple):
    """The result of a solver for one linear, or for each linear of a batch.

    Attributes:
        weight: the new weight [..., out, in], float32, exactly zero where the mask is False.
        mask: True = kept.
        error: ‖(W − Ŵ)X‖² / ‖WX‖² on the calibration inputs, [...]; None where no gram was
            gathered.
        shift: to be added to the bias, float32 [..., out], if there is a bias; None for no change.
        blocks: the weight as its type of llama.cpp stores it, uint8 [..., out, bytes of a row];
            None for any other grid.
    """

    weight: Tensor
    mask: Mask
    error: Tensor | None
    shift: Tensor | None = None
    blocks: Tensor | None = None

    def each(self) -> list[Solution]:
        """The solutions of the linears of a batch; of one linear itself."""
        if self.weight.dim() == 2:
            return [self]
        parts = [[None] * len(self.weight) if x is None else x for x in self]
        return [Solution(*own) for own in zip(*parts, strict=True)]

    @staticmethod
    def measured(
        weight: Weight, solved: Tensor, mask: Mask, gram: Gram, blocks: Tensor | None = None
    ) -> Solution:
        """The solution `solved` for a weight, with the error that it makes on these inputs."""
        error = relative_output_error(weight, solved, gram)
        return Solution(solved, mask, error, blocks=blocks)


@runtime_checkable
class Solver(Protocol):
    """The contract of a solver."""

    requires: ClassVar[frozenset[str]]
    """Names of the statistics it reads."""

    selects_by: ClassVar[str | None]
    """The score by which it can choose the mask itself (`ChoosingSolver`); None: it cannot."""

    whole_units: ClassVar[bool]
    """Whether it chooses whole columns only (`patterns.WholeUnits`)."""

    batched: ClassVar[bool]
    """Whether all that it is given may have a first dimension [batch, …]: then it solves a linear
    for each, with the statistics, mask and count of each, and takes so many times the memory."""

    by_rows: ClassVar[bool]
    """Whether several processes can solve the rows of one linear together, but for the pattern:
    then `prepare` also takes the processes, and the pattern of `choose` is a `SharedRows`."""

    @property
    def rounds(self) -> bool:
        """Whether it also rounds the remaining weights."""
        ...

    @property
    def grid(self) -> GroupGrid | BlockGrid | None:
        """The grid of groups or blocks on which the weights of its solutions are, if any."""
        ...

    @property
    def shifts(self) -> bool:
        """Whether its solutions have a `shift` for the bias."""
        ...

    def prepare(self, statistics: Statistics) -> Any:
        """Compute everything that depends only on the input, once per group of linears."""
        ...

    def solve(self, weight: Weight, prepared: Any, mask: Mask) -> Solution:
        """Solve one linear [out, in] of any floating dtype, in float32; the mask is held.

        It changes no argument.

        Raises:
            NumericalError: a weight is infinite or not a number, or a matrix cannot be factorised.
        """
        ...

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory that `prepare` and `solve` take for a weight [out, in].

        The weight, the statistics and the mask are not included. The worst case counts: a matrix
        that float32 cannot factorise is factorised in float64.
        """
        ...


class ChoosingSolver(Solver, Protocol):
    """The contract of a solver whose `selects_by` names a score."""

    def choose(self, weight: Weight, prepared: Any, pattern: Pattern, sparsity: float) -> Solution:
        """Solve one linear, and select its mask while it works; otherwise as `solve`.

        Raises:
            PatternError, ShapeError: the pattern cannot hold this sparsity or shape.
        """
        ...


class SolverDefaults(CheckedPart):
    """What most solvers share: they choose no mask and shift no bias. They round where a parameter
    `bits` says so, and groups are as wide as a parameter `group`.
    """

    selects_by: ClassVar[str | None] = None
    whole_units: ClassVar[bool] = False
    batched: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    shifts: ClassVar[bool] = False
    bits: Bits = 0
    group = GROUPS[0]

    @property
    def rounds(self) -> bool:
        """Whether it also rounds the remaining weights."""
        return self.bits != 0

    @property
    def grid(self) -> GroupGrid | BlockGrid | None:
        """The grid of groups or blocks on which the weights of its solutions are."""
        if isinstance(self.bits, str):
            return BlockGrid(self.bits)
        return GroupGrid(self.bits, self.group) if self.bits in BITS else None


@dataclass(frozen=True)
class RoundingSolver(SolverDefaults):
    """The parameters that solvers share which prune, and then round if `bits` is not 0.

    Args:
        damping: fraction of the mean diagonal of the gram added to its diagonal.
        refit_steps: conjugate-gradient steps on the mask.
        bits: 2, 3 or 4 to round in groups, 8 to round to int8 with one scale for each row, a type
            of llama.cpp such as q4_k to round to its blocks; 0 not to round.
        group: 32, 64 or 128 weights of a row that share a scale; for 2 to 4 bits.
        descent: passes of coordinate descent over the rounded weights; not for 8 bits.

    Raises:
        RecipeError: a parameter is out of range.
    """

    damping: NonNegative = 0.01
    refit_steps: Annotated[int, Field(ge=0)] = 10
    bits: Bits = 0
    group: Group = 64
    descent: Annotated[int, Field(ge=0)] = 4


solvers: Registry[type[Solver]] = Registry("solver", __name__)
