"""Allocation: how much sparsity does each linear get, so that the whole gets what was asked?

An allocation is a frozen dataclass that maps the sizes of the linears and the asked sparsity to
one sparsity per linear. One file each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from secateur.registry import Registry

__all__ = ["Allocation", "allocations"]


class Allocation(Protocol):
    """The contract of an allocation."""

    def __call__(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
        """The sparsity of each linear, by name; the mean weighted by size is the one asked for.

        Args:
            sizes: the number of weights of each linear, by name.
            sparsity: the fraction of zeros asked for over all of them.
        """
        ...


allocations: Registry[type[Allocation]] = Registry("allocation", __name__)
