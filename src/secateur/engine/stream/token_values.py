"""Arguments of a decoder layer that depend on the tokens, such as per-layer embeddings.

Gemma 3n and Gemma 4 hand each layer a vector for each token, looked up by its id and by the number
of the layer. For all layers together these vectors are several times as large as the hidden states.
So they are not stored for the run. When a layer's turn comes, they are computed from the token ids
for this layer alone, which costs one forward of what is before the layers. They stay until another
layer's turn comes: in memory, or in a file where hidden states are in files. They depend neither on
weights of the layers nor on masks, so the pruned and the dense model share them, and a resumed run
computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import LayerCall, token_values
from secateur.engine.stream.targets import Target
from secateur.precision import exact_matmuls


class TokenValues:
    """The values of one layer at a time, for the windows of this process.

    Args:
        target: the model.
        windows: token ids [samples, sequence_length].
        folder: a folder in it keeps the values; None for memory.
        own: the windows of this process; None for all.
    """

    def __init__(
        self, target: Target, windows: Tensor, folder: Path | None, own: slice | None = None
    ) -> None:
        self.target, self.windows = target, windows
        self.own = own or slice(0, len(windows))
        # One for each process, because each computes its values when it is ready.
        name = f"token-values.{self.own.start}-{self.own.stop}"
        self.folder = None if folder is None else folder / name
        self.layer: int | None = None
        self.values: Activations | None = None

    def read(self, layer: int, call: LayerCall, rows: Sequence[int]) -> Tensor:
        """The values of a layer for some windows: [windows, sequence_length, columns].

        Args:
            layer: number of the layer.
            call: its call, which says what depends on the tokens.
            rows: numbers of the windows.
        """
        values = self.of(layer, call)
        found = [values.read(slice(row, row + 1)) for row in rows]
        return torch.cat(found).to(self.target.device)

    def held(self, layer: int, call: LayerCall) -> Tensor | None:
        """The values of a layer for all windows, if they are in memory."""
        return self.of(layer, call).held

    def of(self, layer: int, call: LayerCall) -> Activations:
        """The values of a layer; computed when its turn comes."""
        if self.values is None or self.layer != layer:
            self.close()
            self.values, self.layer = self.computed(layer, call), layer
        return self.values

    @torch.no_grad()
    def computed(self, layer: int, call: LayerCall) -> Activations:
        """Compute the values of a layer, one window at a time."""
        target, stored = self.target, None
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
        with target.outside(), exact_matmuls(target.device):
            for row in range(self.own.start, self.own.stop):
                rows = slice(row, row + 1)
                ids = self.windows[rows].to(target.device)
                found = token_values(target.model, target.layers, ids, layer, call)
                if stored is None:
                    shape = (len(self.windows), *found.shape[1:])
                    in_memory = self.folder is None
                    stored = Activations(shape, found.dtype, self.folder, in_memory, self.own)
                stored.write(rows, found)
        assert stored is not None
        stored.advance(layer)
        return stored

    def close(self) -> None:
        """Release the values."""
        if self.values is not None and self.layer is not None:
            self.values.forget(self.layer)
        self.values = self.layer = None
