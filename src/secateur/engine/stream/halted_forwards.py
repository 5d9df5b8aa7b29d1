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
same as in a plain call.

Where a group is fitted to the dense model, the forwards of the dense layer halt at the same groups.
So both inputs of a group are known at the same time. A linear that writes to the residual stream
can compensate the current error of that stream. So the terms that earlier linears added to the
stream are summed for each model.

    changing model  x̂ ──► group ──► …        halted together, group by group:
    dense model     x ──► group ──► …        gather(x̂, x), change the group, continue
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from secateur.engine.stream.calibration_stream import LayerInputs
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.layouts import input_mark
from secateur.engine.stream.offload import ActivationOffload
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
        parking: ActivationOffload | None,
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


Groups = Sequence[Sequence[Linear]]


class HaltedLayer:
    """One model's forwards through one decoder layer, halted at each group of linears.

    Args:
        lane: the hidden states of the model.
        layer: the layer with its weights.
        groups: linears of the layer, by shared input; the forwards do not halt at an empty group.
        writers: linears whose output is added to the residual stream, if the sums are needed.
        stores: whether the outputs of the layer are stored.
    """

    def __init__(
        self,
        lane: LayerInputs,
        layer: nn.Module,
        groups: Groups,
        writers: Sequence[Linear] = (),
        *,
        stores: bool = True,
    ) -> None:
        self.lane, self.layer, self.stores = lane, layer, stores
        self.parking = lane.parking(layer)
        forwards = [partial(self.forward, batch) for batch in lane.batches]
        self.halting = HaltingForwards(groups, forwards, self.parking, lane.matmuls)
        self.groups = groups
        # Summed inside the forwards, so the sums are parked with the forwards' other tensors.
        self.sums: dict[int, Tensor] = {}
        self.handles = [x.module.register_forward_hook(self.add) for x in writers]

    def forward(self, batch: slice) -> None:
        """The forward of one micro-batch."""
        hidden = self.lane.read(batch)
        if self.parking is not None:
            self.parking.live.note(hidden)
        outputs = call_layer(self.layer, hidden, self.lane.call(batch))
        if self.stores:
            self.lane.write(batch, outputs)
        self.lane.step()

    def add(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Add the output of a writer to the sum of the running forward."""
        before = self.sums.get(self.halting.current)
        self.sums[self.halting.current] = out if before is None else before + out

    def inputs(self, index: int) -> Tensor:
        """The residual stream before the layer, of micro-batch `index`."""
        return self.lane.read(self.lane.batches[index])

    def added(self, index: int) -> Tensor | float:
        """The sum of the writers' outputs so far. Read it only while the forward is not parked."""
        return self.sums.get(index, 0.0)

    def close(self) -> None:
        """Stop the halted forwards, remove the hooks, and release the sums."""
        self.halting.close()
        for handle in self.handles:
            handle.remove()
        self.sums = {}


def dense_copy(
    layer: nn.Module, groups: Groups, writers: Sequence[Linear], of_expert: Callable[[str], bool]
) -> tuple[nn.Module, Groups, list[Linear]]:
    """Copy a layer that is still dense, with its groups and writers.

    The groups of experts are empty in the copy, because an expert sees different tokens in the two
    models.

    Args:
        layer: a layer without hooks, because a copy would have them too.
        groups: its linears, by shared input.
        writers: its linears that write to the residual stream.
        of_expert: returns whether the linear of this name belongs to an expert.
    """
    twin = copy.deepcopy(layer)
    modules = dict(twin.named_modules())
    names = {id(module): name for name, module in layer.named_modules()}

    def copied(linear: Linear) -> Linear:
        return Linear(linear.name, modules[names[id(linear.module)]])

    own = [[copied(x) for x in group if not of_expert(x.name)] for group in groups]
    return twin, own, [copied(x) for x in writers]


def in_step(
    changing: HaltedLayer,
    dense: HaltedLayer | None,
    gather: Callable[[int, int, Tensor, Tensor | None], None],
    change: Callable[[int], None],
    *,
    dense_outputs: bool = False,
) -> None:
    """Pass all micro-batches through a layer, group by group, in step with the dense model.

    Both layers are closed at the end.

    Args:
        changing: the layer that changes; its forwards end after the last group, unless it stores.
        dense: the same layer of the dense model; None if only one model passes.
        gather: called with the index of a micro-batch, a group, its input, and its input in the
            dense model (None without a dense model, or if that does not halt there).
        change: called with a group when its input is known from all micro-batches.
        dense_outputs: whether the forwards of the dense model run to their ends.
    """
    halting = dense.halting if dense else None
    try:
        by_group(
            changing.groups, changing.halting, halting, gather, change,
            outputs_needed=changing.stores,
        )  # fmt: skip
        if halting is not None and dense_outputs:
            halting.finish()
    finally:
        changing.close()
        if dense is not None:
            dense.close()
