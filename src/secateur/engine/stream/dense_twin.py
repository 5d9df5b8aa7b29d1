"""Runs two models in step through one decoder layer: the changing model and the dense model.

All micro-batches of both models halt at each group of linears. So both inputs of a group are known
at the same time: the input in the changing model, and the input in the dense model. A linear that
writes to the residual stream can compensate the current error of that stream. So the twin also
sums the terms that earlier linears added to the stream of each model.

    changing model  x̂ ──► group ──► …        halted together, group by group:
    dense model     x ──► group ──► …        gather(x̂, x), change the group, continue
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.forwards import HaltingForwards, by_group
from secateur.engine.stream.lane import Lane
from secateur.models.architecture import Linear

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
        lane: Lane,
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
