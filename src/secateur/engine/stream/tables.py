"""Tables of embeddings that are too large to copy: a forward gets the rows of its own tokens.

The per-layer embeddings of Gemma 3n and small Gemma 4 are the largest matrix of the model, several
times as large as a decoder layer. On another device, or in another dtype than that of the file,
the whole table would have to be copied each time that a layer's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def per_layer_table(model: Any) -> nn.Embedding | None:
    """The table of per-layer embeddings; None if the model has none.

    Args:
        model: of transformers, which calls it so in every family that has one.
    """
    table = getattr(model.get_decoder(), "embed_tokens_per_layer", None)
    return table if isinstance(table, nn.Embedding) else None


@contextmanager
def rows_in_use(
    table: nn.Embedding, whole: Tensor, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """A context in which every forward of a table has the rows of its tokens, and no others.

    Args:
        table: a module that is called with token ids.
        whole: all rows, such as a view of a file.
        device: where the rows go.
        dtype: of the computation.
    """
    empty, padding = table.weight, table.padding_idx

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, places = args[0].unique(return_inverse=True)
        taken = whole[rows.to(whole.device)].to(device, dtype)
        table.weight = nn.Parameter(taken, requires_grad=False)
        return (places, *args[1:])

    handle = table.register_forward_pre_hook(take)
    table.padding_idx = None  # it is the number of a row of the whole; only training uses it
    try:
        yield
    finally:
        handle.remove()
        table.weight, table.padding_idx = empty, padding
