"""Statistics: what must be known of a linear, gathered while calibration streams by.

A statistic takes batch after batch, can be merged with one gathered elsewhere (another process,
another share of the tokens), and returns its value at the end. It keeps no tokens, so its memory
does not grow with them. One file each.

A statistic names its source: an object that says which numbers of a linear it is updated with.
There are two places to gather them. A `ForwardSource` sees the inputs of a linear in the forwards
of the run, right before the linear is pruned. A `BackwardSource` sees a backward of each window's
loss through the dense model, before the run. A statistic of a new kind brings its own source.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import NumericalError, located
from secateur.machine import check_finite, exact_in_tf32
from secateur.models.architecture import Linear
from secateur.parallel.ranks import Ranks
from secateur.registry import Registry
from secateur.sparsity.hessian import dense_target
from secateur.types import STORED, Inputs, Weight

__all__ = [
    "BackwardSource",
    "ColumnSums",
    "CrossGram",
    "ForwardSource",
    "Gathering",
    "GradientMean",
    "GradientSource",
    "GroupStatistics",
    "InputSource",
    "Sources",
    "Statistic",
    "StatisticSource",
    "Summed",
    "check_finite",
    "held_bytes",
    "statistics",
    "watched",
]

S = TypeVar("S", bound="Statistic")
P = TypeVar("P", bound="Stacked")
Shape = tuple[int, int]
Update = Callable[[Tensor], None]


class StatisticSource(ABC):
    """Which numbers of a linear update a statistic, and how many statistics that takes.

    Attributes:
        name: what lists call it.
        shared: whether linears that share an input share the statistic too.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False

    @abstractmethod
    def watch(self, linear: Linear, update: Update) -> RemovableHandle:
        """Call `update` with the numbers of every forward or backward, until the handle ends it."""

    def nbytes(self, statistic: type[Statistic], shapes: Sequence[Shape]) -> int:
        """Bytes that a statistic holds for linears that share an input, given their (out, in)."""
        return sum(statistic.nbytes(shape) for shape in (shapes[:1] if self.shared else shapes))


class ForwardSource(StatisticSource):
    """Numbers of a forward: from the inputs that arrive at a linear which is not pruned yet."""

    @abstractmethod
    def rows(self, linear: Linear, x: Inputs) -> Tensor:
        """What a statistic is updated with, given inputs [tokens, in] of the linear."""

    def watch(self, linear: Linear, update: Update) -> RemovableHandle:
        """Call `update` in every forward, by a hook."""

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            update(self.rows(linear, args[0].detach().flatten(0, -2)))

        return linear.module.register_forward_pre_hook(before)


class BackwardSource(StatisticSource):
    """Numbers of a backward: a pass through the dense model before the run gathers them."""


Sources = Mapping[str, ForwardSource]
"""The sources of statistics that forwards gather, by the names of the statistics."""


class InputSource(ForwardSource):
    """The inputs of a linear, [tokens, in]."""

    name = "inputs"
    shared = True

    def rows(self, linear: Linear, x: Inputs) -> Tensor:
        """The inputs themselves."""
        return x


class GradientSource(BackwardSource):
    """The gradient of a weight for one window, [out, in]."""

    name = "gradients"

    def watch(self, linear: Linear, update: Update) -> RemovableHandle:
        """Call `update` in every backward. The weight must require its gradient by now."""
        transposed = linear.transposed
        weight = linear.module.get_parameter("weight")
        return weight.register_hook(lambda g: update(g.t() if transposed else g))


@runtime_checkable
class Statistic(Protocol):
    """The contract of a statistic.

    Args:
        shape: (out, in) of the linear's weight.
        device: where the sums are kept and computed.
    """

    source: ClassVar[StatisticSource]
    """Where the numbers come from that it is updated with."""

    total: Tensor
    """The running sum: what merging adds up, and what processes may all-reduce."""

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None: ...

    def update(self, x: Float[Tensor, "rows in"]) -> None:
        """Add what the source gives for one batch, of any floating dtype."""
        ...

    def merge(self: S, other: S) -> None:
        """Add all that `other` has seen; `other` is not changed."""
        ...

    def value(self) -> Tensor:
        """The statistic over everything so far, float32; afterwards nothing is added any more."""
        ...

    @classmethod
    def nbytes(cls, shape: Shape) -> int:
        """Bytes that it holds for a weight of this shape, (out, in)."""
        ...


class Summed:
    """A statistic whose running sums add up."""

    total: Tensor

    def merge(self, other: Any) -> None:
        """Add what `other` has seen."""
        self.total += other.total.to(self.total.device)


class Stacked(Summed):
    """A statistic of one linear or, with their number as last argument, of several.

    Then its sums and its value have a first axis for the linears, and its inputs are
    [linears, tokens, in]. Rows of zeros change nothing.
    """

    def of(self: P, linears: int | Sequence[int]) -> P:
        """The statistic of one of the linears, with the same sums; or of some, with a copy."""
        own = copy.copy(self)
        own.total = self.total[linears]
        return own


class ColumnSums(Summed):
    """The base of statistics with a few float64 sums for each input feature.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.

    Attributes:
        sums: the number of sums.
    """

    source: ClassVar[StatisticSource] = InputSource()
    sums: ClassVar[int] = 1

    def __init__(self, shape: Shape, device: torch.device | str = "cpu", *linears: int) -> None:
        size = (*linears, self.sums, shape[1])
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    @classmethod
    def nbytes(cls, shape: Shape) -> int:
        """Eight bytes for each sum."""
        return 8 * cls.sums * shape[1]


class GradientMean(Summed):
    """The mean over windows of something of their gradients: the base of statistics of gradients.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.
    """

    source: ClassVar[StatisticSource] = GradientSource()

    def __init__(self, shape: Shape, device: torch.device | str = "cpu") -> None:
        # the last number counts the windows, so that all-reducing `total` merges both
        self.total = torch.zeros(shape[0] * shape[1] + 1, device=device)
        self.sum = self.total[:-1].view(shape)  # shares the memory of `total`

    def value(self) -> Weight:
        """The mean, float32 [out, in]; 0 before any window."""
        return self.sum / max(int(self.total[-1]), 1)

    @staticmethod
    def nbytes(shape: Shape) -> int:
        """Four bytes for each weight."""
        return 4 * shape[0] * shape[1]


statistics: Registry[type[Statistic]] = Registry("statistic", __name__)


@dataclass(frozen=True)
class Gathering:
    """The sources of the statistics to gather, by the names of the statistics.

    Attributes:
        forward: the statistics that the forwards of a run gather.
        backward: those that a backward through the dense model gathers before the run.
    """

    forward: Sources
    backward: Mapping[str, BackwardSource]

    @classmethod
    def of(cls, names: Iterable[str]) -> Gathering:
        """Sort names of statistics. Nobody gathers the stored weight.

        Raises:
            RecipeError: a name is unknown.
        """
        sources = {name: statistics[name].source for name in sorted(names) if name != STORED}
        return cls(
            {name: x for name, x in sources.items() if isinstance(x, ForwardSource)},
            {name: x for name, x in sources.items() if isinstance(x, BackwardSource)},
        )


def held_bytes(names: Iterable[str], shapes: Sequence[Shape]) -> int:
    """Bytes that statistics hold for linears that share an input, given their (out, in)."""
    return sum(statistics[name].source.nbytes(statistics[name], shapes) for name in names)


@contextmanager
def watched(
    linears: Sequence[Linear], names: Iterable[str]
) -> Iterator[dict[str, dict[str, Statistic]]]:
    """New statistics of linears, by linear and name. Every pass inside the context updates them.

    The weights require their gradients inside the context if a backward is to be watched.
    """
    order = sorted(names)
    kept = {x.name: {n: statistics[n](x.shape, x.weight.device) for n in order} for x in linears}
    leaves = [x.module.get_parameter("weight") for x in linears]
    required = [leaf.requires_grad for leaf in leaves]
    handles = []
    try:
        if Gathering.of(order).backward:
            for leaf in leaves:
                leaf.requires_grad_(True)
        for linear in linears:
            for name, statistic in kept[linear.name].items():
                handles.append(statistics[name].source.watch(linear, statistic.update))
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        for leaf, before in zip(leaves, required, strict=True):
            leaf.requires_grad_(before)


_ROWS = 512  # the largest float32 product besides the sums of a cross gram


class CrossGram(Stacked):
    """M = Σ_t y_t x̂_tᵀ, float32 [rows, in]: y_t in the dense model, x̂_t in the pruned one.

    Products are float32 and their sums float64, as in `Gram`.

    Args:
        rows: the size of y, which is inputs or outputs of the linear.
        in_features: the number of input features.
        device: where the sums are kept and computed.
        *linears: the number of linears, if there are several.
        of_outputs: whether y is the output that the only linear of a group should have. Else it is
            the dense input of all its linears.
    """

    def __init__(
        self,
        rows: int,
        in_features: int,
        device: torch.device | str = "cpu",
        *linears: int,
        of_outputs: bool = False,
    ) -> None:
        self.of_outputs = of_outputs
        size = (*linears, rows, in_features)
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def update(
        self, target: Float[Tensor, "*linears tokens rows"], x: Float[Tensor, "*linears tokens in"]
    ) -> None:
        """Add y and x̂ of the same tokens, some rows of y at a time."""
        targets, inputs = target.detach().float(), x.detach().float()
        pairs = zip(targets.split(_ROWS, -1), self.total.split(_ROWS, -2), strict=True)
        with exact_in_tf32(target, x):
            for columns, sums in pairs:
                sums += columns.mT @ inputs

    def value(self) -> Float[Tensor, "*linears rows in"]:
        """M, float32. It takes the place of the sums."""
        self.total = self.total.float()
        return self.total


class GroupStatistics:
    """Running statistics of groups of linears. The linears of a group share an input.

    Args:
        sources: sources of the statistics, by their names.
        groups: one group; or those of a batch of experts, with equal shapes.
        device: device of the sums.
        cross: makes the products of inputs and targets, which need the gram among the statistics;
            None where the target of a linear is its own output.
        batch: whether values have a first axis for the groups, even for one.

    Attributes:
        tokens: number of inputs so far, of each group.
    """

    def __init__(
        self,
        sources: Sources,
        groups: Sequence[Sequence[Linear]],
        device: torch.device,
        cross: Callable[..., CrossGram] | None = None,
        *,
        batch: bool = False,
    ) -> None:
        self.sources, self.groups, self.batch = sources, list(groups), batch
        self.tokens, shape = [0] * len(groups), groups[0][0].shape
        count = [len(groups)] if batch else []
        shared = {name: statistics[name] for name, source in sources.items() if source.shared}
        own = sorted(sources.keys() - shared.keys())  # one statistic for each linear
        stacked = {name for name, kind in shared.items() if batch and issubclass(kind, Stacked)}
        self._stacked: dict[str, Any] = {n: shared[n](shape, device, *count) for n in stacked}
        alone = [name for name in shared if name not in stacked]
        self._alone = [{n: shared[n](shape, device) for n in alone} for _ in groups]
        self._own = {x.name: {n: statistics[n](x.shape, device) for n in own} for x in self.linears}
        self.cross = None if cross is None else cross(*count)
        self._share()

    def _share(self) -> None:
        """Find the sums of each group of a batch within those of all."""
        every, numbers = [*self._stacked.values(), self.cross], range(len(self.groups))
        self._parts = [[x.of(i) if x and self.batch else x for x in every] for i in numbers]

    @property
    def linears(self) -> list[Linear]:
        """The linears of all groups."""
        return [linear for group in self.groups for linear in group]

    def update(
        self, x: Tensor, target: Tensor | None = None, counts: Sequence[int] | None = None
    ) -> None:
        """Add the inputs of one micro-batch.

        Args:
            x: the inputs, with any leading shape; those of a batch one group after the other.
            target: their targets, if they have any.
            counts: the number of inputs of each group of a batch.
        """
        given = [y.reshape(-1, y.shape[-1]) for y in (x, target) if y is not None]
        counts = [len(given[0])] if counts is None else list(counts)
        self.tokens = [sum(both) for both in zip(self.tokens, counts, strict=True)]
        parts = list(zip(*(y.split(counts) for y in given), strict=True))
        # A GPU takes the products of all groups at once. A processor is as fast one by one.
        together = self.batch and given[0].device.type != "cpu"
        if together:
            for groups, rows in _padded(given, counts):
                self._add_together(groups, *rows)
        for number, (rows, *targets) in enumerate(parts):
            *stacked, cross = self._parts[number]
            for sums in stacked if not together else ():
                sums.update(rows)
            if cross is not None and targets and not together:
                cross.update(*targets, rows)
            for name, statistic in self._alone[number].items():
                statistic.update(self.sources[name].rows(self.groups[number][0], rows))
            for linear in self.groups[number]:
                for name, statistic in self._own[linear.name].items():
                    statistic.update(self.sources[name].rows(linear, rows))

    def _add_together(self, groups: list[int], x: Tensor, target: Tensor | None = None) -> None:
        """Add inputs of some groups of a batch, side by side."""
        updates: list[tuple[Any, ...]] = [(sums, x) for sums in self._stacked.values()]
        if self.cross is not None and target is not None:
            updates.append((self.cross, target, x))
        for sums, *values in updates:
            every = len(groups) == len(self.groups)
            some = sums if every else sums.of(groups)
            some.update(*values)
            if not every:  # they were a copy
                sums.total[groups] = some.total

    def keep(self, numbers: Sequence[int]) -> None:
        """Forget all groups of a batch but these."""
        if len(numbers) < len(self.groups):
            self.groups = [self.groups[i] for i in numbers]
            self.tokens = [self.tokens[i] for i in numbers]
            self._alone = [self._alone[i] for i in numbers]
            self._stacked = {name: sums.of(numbers) for name, sums in self._stacked.items()}
            self.cross = None if self.cross is None else self.cross.of(numbers)
            self._share()

    def merge(self, ranks: Ranks) -> None:
        """Add up the statistics that the processes have gathered, each from its own windows.

        Each sum passes alone, so no process holds more than one copy of one sum besides its own.
        """
        self.tokens = [sum(own) for own in zip(*ranks.gather(self.tokens), strict=True)]
        kept = [self._stacked, *self._alone, *self._own.values()]
        every: list[Any] = [statistic for named in kept for statistic in named.values()]
        for statistic in (*every, self.cross):  # in the same order in every process
            if statistic is not None:
                ranks.total(statistic.total)

    def value(self) -> dict[str, Tensor]:
        """The statistics that a group shares; of a batch with a first axis for the groups.

        Raises:
            NumericalError: the inputs overflowed; the message names the first linear that reads
                them.
        """
        self._parts = []  # so that values take the place of the sums
        if not self.batch:
            return self.value_of(0)
        try:
            found = {name: sums.value() for name, sums in self._stacked.items()}
        except NumericalError:
            for number in range(len(self.groups)):  # the one at fault has a name
                self.value_of(number)
            raise
        pairs = zip(self.groups, self._alone, strict=True)
        alone = [_values(group[0], own) for group, own in pairs]
        return found | {name: torch.stack([x[name] for x in alone]) for name in alone[0]}

    def value_of(self, number: int) -> dict[str, Tensor]:
        """The statistics that one group shares; raises as `value`."""
        stacked = {name: sums.of(number) for name, sums in self._stacked.items()}
        return _values(self.groups[number][0], {**stacked, **self._alone[number]})

    def own(self, linear: Linear) -> dict[str, Tensor]:
        """The statistics that a linear of a group has for itself.

        Raises:
            NumericalError: its numbers overflowed.
        """
        return _values(linear, self._own[linear.name])

    def weights(self, damping: float) -> Callable[[Sequence[Linear]], Tensor]:
        """Return a function that gives the weights to prune in place of the linears' own.

        They are its own weights, or those that fit their targets best, [linears, out, in]. Only the
        linears at a place in the groups of a batch are given together.

        Args:
            damping: strength of the pull of a fit towards the dense weights.
        """
        places = {x.name: i for i, group in enumerate(self.groups) for x in group}
        if self.cross is None:
            return _stacked
        gram, moments = self.value()["gram"], self.cross.value()
        if self.batch:

            def fitted(linears: Sequence[Linear]) -> Tensor:
                theirs = [places[x.name] for x in linears]
                weights = _stacked(linears).float()
                return dense_target(gram[theirs], moments[theirs], weights, damping)

            return fitted
        if self.cross.of_outputs:
            return lambda linears: dense_target(gram, moments, linears[0].weight.float(), damping)[
                None
            ]
        # A fit of the dense inputs serves all linears: [in, in], with W on its left.
        identity = torch.eye(len(gram), device=gram.device)
        shared = dense_target(gram, moments, identity, damping)
        return lambda linears: _stacked(linears).float() @ shared

    def release(self) -> None:
        """Forget the sums that the groups share. Values that were read stay."""
        self._stacked.clear()
        self._alone = [{} for _ in self.groups]
        self.cross, self._parts = None, []


def _padded(
    given: Sequence[Tensor], counts: Sequence[int]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Rows of several groups side by side, with rows of zeros behind.

    The first piece has all groups. Groups with more than twice as many rows as the mean have the
    rest in later pieces, so at most half of a piece is zeros.

    Args:
        given: tensors [rows, …], one group after the other.
        counts: the number of rows of each group.

    Yields:
        Numbers of groups, and [groups, rows, …] of each tensor.
    """
    device, longest = given[0].device, max(counts)
    width = max(1, min(longest, -(-2 * sum(counts) // len(counts))))
    bounds = torch.tensor([0, *accumulate(counts)], device=device)
    zero = [nn.functional.pad(x, (0, 0, 0, 1)) for x in given]  # one row more, of zeros
    for begin in range(0, longest, width):
        groups = [i for i, count in enumerate(counts) if count > begin or not begin]
        here = torch.tensor(groups, device=device)
        places = bounds[here, None] + torch.arange(begin, begin + width, device=device)
        places = torch.where(places < bounds[here + 1, None], places, len(given[0]))
        yield groups, [x[places] for x in zero]


def _stacked(linears: Sequence[Linear]) -> Tensor:
    """The weights of linears of a shape, [linears, out, in]; of one without a copy."""
    weights = [x.weight for x in linears]
    return weights[0][None] if len(weights) == 1 else torch.stack(weights)


def _values(linear: Linear, gathered: Mapping[str, Statistic]) -> dict[str, Tensor]:
    with located(linear.name):
        return {name: statistic.value() for name, statistic in gathered.items()}
