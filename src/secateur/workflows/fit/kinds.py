"""The levels of a fit: how a linear can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LevelKind:
    """How a level stores linears.

    Attributes:
        values: such as `int4`.
        sparsity: the fraction of zeros.
    """

    values: str
    sparsity: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sparsity:.0%} zeros, {self.values}" if self.sparsity else self.values

    @property
    def family(self) -> str:
        """Which techniques it uses."""
        if self.rounds_inputs:
            return "both" if self.sparsity else "quantize"
        return "prune"

    @property
    def rounds_inputs(self) -> bool:
        """Whether values are integers, so that kernels round the inputs."""
        return self.values.startswith("int")


KINDS = (
    LevelKind("bfloat16", 0.0),
    LevelKind("int8", 0.0),
    LevelKind("int4", 0.0),
    LevelKind("int3", 0.0),
    *(LevelKind(values, 0.5) for values in ("bfloat16", "int8", "int4", "int3")),
    *(LevelKind(values, 0.7) for values in ("bfloat16", "int4")),
)
"""The levels; the first is the model itself."""

FINER = tuple(
    LevelKind(values, sparsity)
    for values in ("int4", "int3")
    for sparsity in (0.3, 0.4, 0.45, 0.55, 0.6, 0.65, 0.7)
    if LevelKind(values, sparsity) not in KINDS
)
"""Kinds without a level of their own, for mixes that are made whole (`finer`)."""


def probe_of(levels: Sequence[LevelKind]) -> int:
    """The level at which the layers are surveyed: the middle of what they may lose."""
    wanted = (LevelKind("int4", 0.5), LevelKind("int4", 0.0))
    return next(levels.index(kind) for kind in wanted if kind in levels)
