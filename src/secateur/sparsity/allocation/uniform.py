"""Uniform: every linear gets the sparsity that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.sparsity.allocation import allocations

__all__ = ["Uniform"]


@allocations.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every linear, as in the Wanda and SparseGPT papers."""

    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """The asked sparsity for each name."""
        return dict.fromkeys(sizes, sparsity)
