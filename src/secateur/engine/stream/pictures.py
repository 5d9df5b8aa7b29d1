"""Records the calls of the layers for one window with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import LayerCall, call_of, record
from secateur.errors import ArchitectureError


def recorded_with(
    model: Any, layers: nn.ModuleList, ids: Tensor, beside: Mapping[str, Tensor]
) -> tuple[Tensor, list[LayerCall]]:
    """The first layer's input, and how each layer is called, for one window with pictures.

    Raises:
        ArchitectureError: the model adds something to the hidden states between its layers.
    """
    recorders = record(model, layers, ids, beside)
    hidden = recorders[0].hidden
    assert hidden is not None
    for index, recorder in enumerate(recorders):
        assert recorder.hidden is not None
        if not torch.equal(recorder.hidden, hidden):
            raise ArchitectureError(
                f"{type(model).__name__} adds {', '.join(beside)} to the hidden states between its "
                f"layers, first before layer {index}",
                remedy="calibrate this model on text alone",
            )
    return hidden, [call_of(recorder) for recorder in recorders]
