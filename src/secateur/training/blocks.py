"""Distillation of a block of decoder layers on hidden states that are stored.

    x̂: what enters the block in the pruned model      f_θ: the block
    y: the dense model's hidden states after it       p: the dense model's predictions

    inside the model     minimise over θ   mean_t ‖f_θ(x̂)_t − y_t‖² / ‖y_t‖²
    at its end           minimise over θ   the loss of a distillation, on the logits after f_θ(x̂)

Only the layers of the block are in memory; at the end of the model also its norm and its head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.prune.reconstruction import output_error
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.ends import ModelEnds
from secateur.models.architecture import Architecture
from secateur.training.batches import Batch
from secateur.training.objectives import Objective
from secateur.training.teachers import ModelTeacher, TeacherOutput

__all__ = ["HiddenError", "LayerBlock", "LossAfterBlock", "StreamedTeacher", "module_of"]


def module_of(architecture: Architecture, layers: dict[int, nn.Module]) -> nn.Module:
    """Return a module of some decoder layers, whose parameters have their names in the model.

    Args:
        architecture: the description of the model.
        layers: the layers by number.
    """
    whole = holder = nn.Module()
    for part in architecture.layers_path.split("."):
        inner = nn.Module()
        holder.add_module(part, inner)
        holder = inner
    for number, layer in layers.items():
        holder.add_module(str(number), layer)
    return whole


@dataclass(frozen=True)
class LayerBlock:
    """Consecutive decoder layers, and what enters the first one in the pruned model.

    Args:
        layers: the layers by number, with their weights in float32.
        ends: for each layer, the ends of a model that know how it is called.
        inputs: the stored hidden states of all windows.
    """

    layers: Mapping[int, nn.Module]
    ends: Mapping[int, ModelEnds]
    inputs: Activations

    def outputs(self, batch: Batch) -> Tensor:
        """Return what leaves the last layer, float32 [1, length, width]; see `Carried`."""
        hidden = window_of(self.inputs, batch).float()
        for number, layer in self.layers.items():
            call = self.ends[number].call(number, batch.numbers)
            hidden = call_layer(layer, hidden, call.to(hidden.device, torch.float32))
        return hidden

    def states(self, hidden: Tensor) -> Tensor:
        """Return the hidden states without what layers share."""
        last = max(self.layers)
        return self.ends[last].calls()[last].states(hidden)


@dataclass(frozen=True)
class HiddenError:
    """loss = mean_t ‖f(x̂)_t − y_t‖² / ‖y_t‖², over the tokens t of a window.

    Args:
        block: f and x̂.
        targets: y, the stored hidden states of the dense model.
    """

    block: LayerBlock
    targets: Activations

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        states = self.block.states
        return output_error(
            states(self.block.outputs(batch)), states(window_of(self.targets, batch))
        )


@dataclass(frozen=True)
class LossAfterBlock:
    """A loss on the logits that follow from the outputs of the last block.

    Args:
        block: the block.
        ends: the ends of the pruned model; use the objective only within `ends.outside()`.
        objective: the loss.
    """

    block: LayerBlock
    ends: ModelEnds
    objective: Objective

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        with self.ends.returning(self.block.outputs(batch)):
            return self.objective(self.ends.target.model, batch)


class StreamedTeacher(ModelTeacher):
    """A teacher whose last hidden states are stored. Use it only within `ends.outside()`.

    Args:
        ends: the ends of the dense model.
        states: the outputs of its last decoder layer for all windows.
    """

    def __init__(self, ends: ModelEnds, states: Activations) -> None:
        self.ends, self.states = ends, states
        with ends.returning(None):  # to find the head, the model runs without its layers
            super().__init__(ends.target.model)

    def __call__(self, batch: Batch, temperature: float, layers: Sequence[int]) -> TeacherOutput:
        """See `Teacher`."""
        with self.ends.returning(window_of(self.states, batch)):
            return super().__call__(batch, temperature, layers)


def window_of(states: Activations, batch: Batch) -> Tensor:
    """Return the hidden states of the one window of a batch, on its device."""
    (number,) = batch.numbers
    return states.read(slice(number, number + 1)).to(batch.ids.device)
