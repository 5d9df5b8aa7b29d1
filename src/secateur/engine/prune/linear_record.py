"""The record of one linear in the ledger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LinearRecord:
    """The result of a run for one linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        asked: the sparsity of its task.
        pruned: number of weights that the mask removes.
        zeros: number of zero weights afterwards (the source may already have zeros).
        error: relative squared error of its output on the calibration inputs, if known.
        lost: an estimate of that error if the solver measures none (`engine.prune.collapse`).
        seconds: time for scoring, masking and solving.
        tokens: number of calibration tokens that it received; None if its inputs did not matter.
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

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> LinearRecord:
        """The record in the plain data that `to_json` has made."""
        return cls(**{**entry, "shape": tuple(entry["shape"])})

    def to_json(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)
