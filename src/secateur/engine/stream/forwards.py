"""How calibration passes through one decoder layer.

There are two orders. Both have one decoder layer in memory, and one micro-batch runs at a time:

* `by_layer`, as in the papers. A first pass with dense weights gathers the statistics of every
  linear of the layer. All linears are pruned. A second pass with pruned weights makes the inputs of
  the next layer.
* `by_group`, the default, needs one pass. The forward of every micro-batch halts at the first group
  of linears that it reaches. When all have arrived, the statistics of this group are complete. The
  group is pruned, and the forwards continue with pruned weights to the next group. So later groups
  of the layer see the inputs that they will see in the pruned model, for half the work.

A forward that halts in the middle of a model's `forward()` needs its own stack. Greenlets give it
one within a single thread. So grad mode, thread pools and the order of all operations are the
same as in a plain call. Where a group is fitted to the dense model, the forwards of the dense layer
halt at the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from secateur.engine.stream.kinds import input_mark
from secateur.engine.stream.residency import Parking
from secateur.errors import ArchitectureError
from secateur.models.architecture import Linear

Forward = Callable[[], None]
Gather = Callable[[int, Tensor], None]


class SharedInputs:
    """Hooks on the linears of a layer that report the input of each group, once in each forward.

    Args:
        groups: the linears of the layer, by shared input.
        arrived: called with the group's index and the input of its first linear.
    """

    def __init__(self, groups: Sequence[Sequence[Linear]], arrived: Gather) -> None:
        self.arrived = arrived
        self.seen: dict[int, Hashable] = {}
        self.handles = [
            linear.module.register_forward_pre_hook(self.hook(index, linear))
            for index, group in enumerate(groups)
            for linear in group
        ]

    def hook(self, group: int, linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The hook of one linear."""

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            mark = input_mark(x)
            if group not in self.seen:
                self.seen[group] = mark
                self.arrived(group, x)
            elif self.seen[group] != mark:
                raise ArchitectureError(
                    "this linear does not receive the input its group shares",
                    where=linear.name,
                    remedy="correct `groups` of its family in secateur/models/families",
                )

        return before

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def by_layer(
    groups: Sequence[Sequence[Linear]], forwards: Sequence[Forward], gather: Gather
) -> None:
    """Gather the input of every group in one pass; weights do not change.

    Args:
        groups: the linears of the layer, by shared input.
        forwards: one call per micro-batch.
        gather: called with a group's index and its input, once per micro-batch.
    """
    inputs = SharedInputs(groups, gather)
    try:
        for forward in forwards:
            inputs.seen = {}
            forward()
    finally:
        inputs.remove()


class HaltingForwards:
    """The forwards of all micro-batches through one layer, halted at each group they reach.

    Attributes:
        current: the forward that runs, or ran last.

    Args:
        groups: the linears of the layer, by shared input.
        forwards: one call per micro-batch.
        parking: takes the tensors of halted forwards; None leaves them in memory.
        matmuls: returns a context for the forwards, not for the work between them.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Linear]],
        forwards: Sequence[Forward],
        parking: Parking | None,
        matmuls: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.matmuls = matmuls
        hub = getcurrent()
        self.parking = parking
        self.groups = groups
        self.inputs = SharedInputs(groups, lambda group, x: hub.switch((group, x)))
        self.seen: list[dict[int, Hashable]] = [{} for _ in forwards]
        self.running = [greenlet(forward, parent=hub) for forward in forwards]
        self.current = 0

    def advance(self, index: int) -> tuple[int, Tensor] | None:
        """Run one forward up to the next group. Return group and input, or None at the end."""
        watch: AbstractContextManager[object] = nullcontext()
        self.current, self.inputs.seen = index, self.seen[index]
        if self.parking:
            self.parking.bring_back(index)
            watch = self.parking.live
        with watch, self.matmuls():
            arrival: tuple[int, Tensor] = self.running[index].switch()
        return None if self.running[index].dead else arrival

    def halt(self, index: int) -> None:
        """Park a forward after its input was used."""
        if self.parking:
            self.parking.park(index)

    def finish(self) -> None:
        """Run all forwards to their ends."""
        for index, running in enumerate(self.running):
            while not running.dead:
                if self.advance(index) is not None:
                    self.halt(index)

    def close(self) -> None:
        """Stop the forwards that are still halted."""
        self.inputs.remove()
        for running in self.running:
            if not running.dead:
                running.throw(GreenletExit)


def by_group(
    groups: Sequence[Sequence[Linear]],
    halting: HaltingForwards,
    beside: HaltingForwards | None,
    gather: Callable[[int, int, Tensor, Tensor | None], None],
    prune: Callable[[int], None],
    *,
    outputs_needed: bool = True,
) -> None:
    """Prune each group as soon as all micro-batches have reached it, in one pass.

    Args:
        groups: the linears of the layer, by shared input.
        halting: the forwards of the layer that is pruned.
        beside: the forwards of the dense layer, if there are any. They halt at the same groups,
            except empty groups, and are still halted at the end.
        gather: called with a forward's index, a group's index, its input, and the input of the
            same group in the dense model (None without one).
        prune: called with a group's index when its input is known from all micro-batches.
        outputs_needed: False ends the forwards after the last group.

    Raises:
        ArchitectureError: the micro-batches do not reach the groups in the same order.
    """
    left = len(groups)
    halted = list(range(len(halting.running)))
    while halted and (left or outputs_needed):
        reached: set[int] = set()
        waiting = []
        for index in halted:
            arrival = halting.advance(index)
            if arrival is None:
                reached.add(-1)
                continue
            dense = beside.advance(index) if beside and beside.groups[arrival[0]] else None
            gather(index, *arrival, dense[1] if dense else None)
            reached.update({arrival[0]} if dense is None else {arrival[0], dense[0]})
            group = arrival[0]
            del arrival, dense
            halting.halt(index)
            if beside and beside.groups[group]:
                beside.halt(index)
            waiting.append(index)
        halted = waiting
        if len(reached) > 1:
            raise ArchitectureError(
                "micro-batches do not pass the linears of a layer in the same order",
                where=groups[max(reached)][0].name,
                remedy="run with --sequential layer",
            )
        if halted:
            prune(reached.pop())
            left -= 1
