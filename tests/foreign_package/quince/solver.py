"""Pruned weights become zero, and what stays is stretched."""

from dataclasses import dataclass
from typing import ClassVar

from quince import MIB
from secateur.sparsity.solvers import Solution, solvers
from secateur.types import Mask, Statistics, Weight


@solvers.register("quince-stretch")
@dataclass(frozen=True)
class Stretch:
    """Ŵ = factor · mask ⊙ W.

    Args:
        factor: of every weight that stays.
    """

    factor: float = 1.25
    requires: ClassVar[frozenset[str]] = frozenset()
    selects_by: ClassVar[str | None] = None
    whole_units: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    grid: ClassVar[None] = None
    shifts: ClassVar[bool] = False

    def prepare(self, statistics: Statistics) -> None:
        """Nothing to compute from the inputs."""

    def solve(self, weight: Weight, prepared: None, mask: Mask) -> Solution:
        """Solve one linear for a given mask."""
        return Solution(self.factor * weight.detach().float() * mask, mask, error=None)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """64 MiB."""
        return 64 * MIB
