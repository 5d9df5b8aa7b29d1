"""What a run did to one linear, as the ledger keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LinearRecord"]


@dataclass(frozen=True)
class LinearRecord:
    """What a run did to one linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        asked: the sparsity that its task asks for.
        pruned: how many weights the mask removes.
        zeros: how many weights are zero afterwards (a source may have zeros of its own).
        error: relative squared error of its output on the calibration inputs, where known.
        lost: an estimate of that error where the solver measures none (`engine.prune.collapse`).
        seconds: spent on scoring, masking and solving.
        tokens: how many inputs the linear of an expert saw; None elsewhere, where it sees all.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    pruned: int
    zeros: int
    error: float | None
    lost: float | None
    seconds: float
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)
