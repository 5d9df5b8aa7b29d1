"""Pieces of a training whose model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.engine.stream.activations import Activations
from secateur.engine.stream.embedding_and_head import ModelEnds
from secateur.models.architecture import Architecture
from secateur.training.batches import Batch
from secateur.training.teachers import ModelTeacher, TeacherOutput


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
        (number,) = batch.numbers
        hidden = self.states.read(slice(number, number + 1)).to(batch.ids.device)
        with self.ends.returning(hidden):
            return super().__call__(batch, temperature, layers)
