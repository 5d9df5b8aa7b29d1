"""The targets of asymmetric fitting: the desired output of each group of linears."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.engine.stream.dense_twin import HaltedLayer
from secateur.models.architecture import Linear


class AsymmetricTargets:
    """The targets of each group of linears that keep the outputs near the dense model's.

    The target of a linear that writes to the residual stream is its dense output plus the current
    error of the stream: T = Wx + (H − Ĥ). Any other linear should return Wx, so its target is its
    dense input x. See `sparsity.dense_target`.

    If the writers are known, only they have a target. They keep the stream near the dense one. In
    trials, fitting the other linears too doubled the cost and did not help. Experts have no target:
    they are fitted to their own dense weights.

    Args:
        pruned: the layer to prune.
        dense: the same layer of the dense model.
        writers: linears of the pruned layer that write to the residual stream.
    """

    def __init__(self, pruned: HaltedLayer, dense: HaltedLayer, writers: Sequence[Linear]) -> None:
        self.pruned, self.dense = pruned, dense
        self.writers = {writer.name for writer in writers}

    def writes(self, group: int) -> bool:
        """Whether a group is a linear that writes to the residual stream."""
        linears = self.dense.groups[group]
        return len(linears) == 1 and linears[0].name in self.writers

    def size(self, group: int) -> int:
        """The size of a group's target for one token; 0 if it has no target."""
        linears = self.dense.groups[group]
        if not linears:
            return 0
        if self.writers:
            return linears[0].shape[0] if self.writes(group) else 0
        return linears[0].shape[1]

    def of(self, index: int, group: int, dense: Tensor) -> Tensor | None:
        """The target of a group for one micro-batch; None if it has no target.

        Args:
            index: number of the micro-batch.
            group: the group.
            dense: its input in the dense model.
        """
        if not self.writes(group):
            return None if self.writers else dense
        stream = self.dense.inputs(index) - self.pruned.inputs(index)
        earlier = self.dense.added(index) - self.pruned.added(index)
        with self.dense.lane.matmuls():
            out = dense.reshape(-1, dense.shape[-1]) @ self.dense.groups[group][0].weight.t()
        return out + (stream + earlier).reshape(out.shape)
