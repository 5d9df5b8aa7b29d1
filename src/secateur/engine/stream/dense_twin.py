"""The dense model beside the pruned one, in step with it through one decoder layer.

At every group of linears both inputs are known at once: those that the group has in the pruned
model, and those that it has in the dense one. From them comes what is wanted of each group: the
dense inputs themselves, or for a linear that writes to the residual stream, the dense outputs and
whatever else is missing in that stream by then.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.forwards import HaltingForwards
from secateur.engine.stream.passage import Passage
from secateur.models.architecture import Linear

__all__ = ["DenseTwin", "Written"]


class Written:
    """What the writers of a layer have added to the residual stream, for each of its forwards.

    The sums are made inside the forwards, so that they are parked with whatever else these keep
    alive; they may be read between `advance` and `halt`.

    Args:
        writers: linears whose output is added to the residual stream.
        halting: the forwards.
    """

    def __init__(self, writers: Sequence[Linear], halting: HaltingForwards) -> None:
        self.halting = halting
        self.sums: dict[int, Tensor] = {}
        self.handles = [x.module.register_forward_hook(self.add) for x in writers]

    def add(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Add an output to the sum of the forward that runs."""
        before = self.sums.get(self.halting.current)
        self.sums[self.halting.current] = out if before is None else before + out

    def so_far(self, index: int) -> Tensor | float:
        """The sum of one forward: [windows, sequence_length, hidden], or nothing yet."""
        return self.sums.get(index, 0.0)

    def close(self) -> None:
        """Take the hooks off, and let go of the sums."""
        for handle in self.handles:
            handle.remove()
        self.sums = {}


class DenseTwin:
    """The dense layer's forwards, halted at the same groups as those of the layer that is pruned.

    Args:
        layer: still dense, and without hooks, for a copy of it is made.
        index: its number.
        groups: its linears, by shared input.
        writers: those of them that write to the residual stream.
        of_expert: whether a linear is an expert's, by its name.
        passage: the hidden states of both models.
        tell: called after every forward.
        matmuls: gives a context for the forwards.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        groups: Sequence[Sequence[Linear]],
        writers: Sequence[Linear],
        of_expert: Callable[[str], bool],
        passage: Passage,
        tell: Callable[[], None],
        matmuls: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.index, self.passage, self.tell = index, passage, tell
        self.layer = copy.deepcopy(layer)
        modules = dict(self.layer.named_modules())
        names = {id(module): name for name, module in layer.named_modules()}
        twin = {id(x.module): modules[names[id(x.module)]] for group in groups for x in group}
        # experts halt nothing here: which tokens they see is not the same in the two models
        self.groups = [
            [Linear(x.name, twin[id(x.module)]) for x in group if not of_expert(x.name)]
            for group in groups
        ]
        assert passage.dense is not None
        self.parking = passage.parking(index, self.layer, passage.dense)
        forwards = [functools.partial(self.forward, batch) for batch in passage.batches()]
        self.matmuls = matmuls
        self.halting = HaltingForwards(self.groups, forwards, self.parking, matmuls)
        self.writers = list(writers)
        same = [Linear(x.name, modules[names[id(x.module)]]) for x in writers]
        self.written = {"dense": Written(same, self.halting)}

    def watch(self, halting: HaltingForwards) -> None:
        """Learn what the layer that is pruned writes to the residual stream."""
        self.written["pruned"] = Written(self.writers, halting)

    def writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the residual stream."""
        names = {writer.name for writer in self.writers}
        return len(self.groups[group]) == 1 and self.groups[group][0].name in names

    def rows(self, group: int) -> int:
        """The size of what is wanted of a group, for one token; 0 where nothing is.

        Of an expert nothing is: it is fitted to its own dense weights.
        Where the writers are known, only they are fitted: they keep the stream near the dense one,
        and fitting the others too brought nothing more in trials, at twice the cost.
        """
        if not self.groups[group]:
            return 0
        if self.writers:
            return self.groups[group][0].shape[0] if self.writes(group) else 0
        return self.groups[group][0].shape[1]

    def wanted(self, index: int, group: int, dense: Tensor) -> Tensor | None:
        """What is wanted of a group for one micro-batch; None where nothing is.

        Args:
            index: of the micro-batch.
            group: the group.
            dense: its input in the dense model.
        """
        if not self.writes(group):
            return None if self.writers else dense
        batch = self.passage.batches()[index]
        stream = self.passage.read_dense(batch) - self.passage.read(batch)
        earlier = self.written["dense"].so_far(index) - self.written["pruned"].so_far(index)
        with self.matmuls():
            out = dense.reshape(-1, dense.shape[-1]) @ self.groups[group][0].weight.t()
        return out + (stream + earlier).reshape(out.shape)

    def forward(self, batch: slice) -> None:
        """The forward of one micro-batch of the dense model."""
        hidden = self.passage.read_dense(batch)
        if self.parking is not None:
            self.parking.live.note(hidden)
        out = call_layer(self.layer, hidden, self.passage.call(self.index, batch))
        self.passage.write_dense(batch, out)
        self.tell()

    def close(self, *, finish: bool) -> None:
        """End the forwards: finish them, so that the dense outputs are known, or give them up."""
        if finish:
            self.halting.finish()
        self.halting.close()
        for written in self.written.values():
            written.close()
        if finish:
            self.passage.advance_dense(self.index + 1)
