"""Allocation: how much sparsity each linear gets, for a given sparsity of the whole.

An allocation works in two steps. `observe` sees one decoder layer of the dense model at a time and
says what to keep of each linear: a number, its scores, or solved weights. `allocate` turns what was
kept of all linears into a sparsity for each; `budget.settle` makes them exact, so that the
whole model loses as many weights as with uniform sparsity. One file each.

An allocation that observes nothing, and needs only the sizes of the linears, is one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from secateur.registry import CheckedPart, Registry
from secateur.sparsity.allocation.budget import Granularity
from secateur.types import Statistics

__all__ = ["Allocation", "AllocationDefaults", "DenseLayer", "Kept", "allocation", "allocations"]

Function = TypeVar("Function", bound=Callable[..., dict[str, float]])

Kept = Callable[[], Iterable[tuple[str, Tensor]]]
"""Streams what `observe` kept, the same pairs in the same order at every call."""


@runtime_checkable
class DenseLayer(Protocol):
    """One decoder layer of the dense model, as an allocation sees it."""

    @property
    def grains(self) -> Mapping[str, Granularity]:
        """The granularity of every competing linear of the model, by full name."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights [out, in] of this layer's linears that compete."""
        ...

    @property
    def fixed(self) -> Mapping[str, float]:
        """Linears of this layer with their own fixed sparsity."""
        ...

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """The statistics of the inputs of each linear of this layer."""
        ...

    @property
    def tokens(self) -> Mapping[str, int]:
        """How many tokens each linear of this layer saw; experts see only those sent to them."""
        ...

    def score(self, name: str) -> Tensor:
        """The scores of a linear that compete under the run's pattern, by the run's score."""
        ...

    def solve(self, name: str, sparsity: float, *, quick: bool = False) -> Tensor:
        """The new weight [out, in] of a linear, by the run's own method.

        Quickly: by SparseGPT where the solver of the run's method reads the gram as well.
        """
        ...

    def solve_all(
        self, sparsities: Mapping[str, float], *, quick: bool = False
    ) -> dict[str, Tensor]:
        """`solve` for some linears, by name; experts are solved many at once."""
        ...


@runtime_checkable
class Allocation(Protocol):
    """The contract of an allocation."""

    requires: ClassVar[frozenset[str]]
    """Names of the statistics it reads itself."""

    uses: ClassVar[frozenset[str]]
    """The parts of the run's method that it uses: `score`, `solver`, both or none."""

    @property
    def judged_tokens(self) -> int:
        """Tokens on which the whole model judges; 0 where it does not.

        A `LevelSearch` judges candidates on them. Any other allocation is given the divergence
        that pruning each linear alone makes, over its weights: `allocate` receives it by the
        linear's name, and `observe` returns the pruned weight (`name/1`). The experts of a layer
        count as one linear.
        """
        ...

    @property
    def reach(self) -> float:
        """How far the sparsity of a linear may differ from the target; 0 for uniform."""
        ...

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """What to keep of a layer, by any key that is used once in a model."""
        ...

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """A sparsity for each linear in `grains`; it need not fit the budget exactly."""
        ...

    def disk_bytes(self, weights: int, itemsize: int) -> int:
        """Disk space of the kept tensors, for so many competing weights of this size."""
        ...

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """Memory that `observe` takes for a layer with so many competing weights of this size.

        The layer, its statistics and the run's own method come on top.
        """
        ...

    def tokens(self, calibration: int, linears: int) -> int:
        """Tokens that pass through the model for it.

        Args:
            calibration: number of calibration tokens.
            linears: number of linears in the model.
        """
        ...


class AllocationDefaults(CheckedPart):
    """What most allocations share: they read the scores of nothing, keep a few numbers, and pass
    calibration through the dense model once.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    judged_tokens: ClassVar[int] = 0

    def disk_bytes(self, weights: int, itemsize: int) -> int:
        """A few numbers."""
        return 0

    def tokens(self, calibration: int, linears: int) -> int:
        """One pass."""
        return calibration


allocations: Registry[type[Allocation]] = Registry("allocation", __name__)


class _ByFunction(AllocationDefaults):
    """An allocation that looks at no weight; calling it is calling its function."""

    reach = 0.0

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """What the function says."""
        found: dict[str, float] = self(grains, sparsity)  # type: ignore[operator]
        return found

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """None."""
        return 0

    def tokens(self, calibration: int, linears: int) -> int:
        """None."""
        return 0


def allocation(function: Function) -> Function:
    """Register a function as an allocation, under its own name.

    It takes the granularity of every linear by name, and the target sparsity; it returns a sparsity
    for each. A keyword `reach` says how far a sparsity may differ from the target; without it none
    may. An allocation that observes layers is a class.
    """
    return allocations.from_function(function, _ByFunction)
