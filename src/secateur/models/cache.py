"""Keys and values during generation: in tensors that are allocated once and read fast.

The default cache of transformers grows by concatenation: every token copies all keys and values
before it. Here a layer allocates its room with the first token, and attention sees a view of the
filled part. The fused kernels are made for many tokens at once. For one token per window, in
bfloat16 on a CPU, two plain matmuls are ten times as fast, if the keys are stored in the order that
the first one needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from secateur.models.attention import OtherAttention


def roomy_cache(config: Any, length: int) -> DynamicCache:
    """An empty cache for texts of at most `length` tokens.

    Layers that store something other than keys and values of each token (recurrent states) stay as
    transformers makes them.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _Layer(length)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _SlidingLayer(length, layer.sliding_window)
    return cache


class OneTokenAttention(OtherAttention):
    """Attention of one token to those before it, softmax(q kᵀ · scale) v, as two matmuls.

    Query heads that share their keys are multiplied together. Causal calls, which have more than
    one token, are not replaced.
    """

    def takes(self, options: dict[str, Any]) -> bool:
        """The attention of one token."""
        return not options.get("is_causal")

    def attend(self, *args: Any, **options: Any) -> Tensor:
        """See `_attended`."""
        return _attended(*args, **options)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` for a model in eval mode, not causal."""
    batch, heads, tokens, size = query.shape
    if enable_gqa:  # [batch, key heads, queries of each, size]
        query = query.reshape(batch, key.shape[1], -1, size)
    scores = (query @ key.transpose(2, 3)).float()
    scores *= size**-0.5 if scale is None else scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores.masked_fill_(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores += attn_mask
    found = scores.softmax(-1).to(value.dtype) @ value
    return found.reshape(batch, heads, tokens, value.shape[-1])


class _Room:
    """Keys [batch, heads, size, length] and values [batch, heads, length, size], partly filled."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.keys: Tensor
        self.values: Tensor

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the states of new tokens [batch, heads, tokens, size]; views of all states."""
        if not self.filled:
            batch, heads, _, size = keys.shape
            self.keys = keys.new_empty(batch, heads, size, self.length)
            self.values = values.new_empty(batch, heads, self.length, values.shape[-1])
        new = slice(self.filled, self.filled + keys.shape[2])
        self.filled = new.stop
        self.keys[..., new] = keys.transpose(2, 3)
        self.values[:, :, new] = values
        return self.keys[..., : self.filled].transpose(2, 3), self.values[:, :, : self.filled]


class _Layer(DynamicLayer):
    """Attends to all tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.room = _Room(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; returns views of all states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.room.add(key_states, value_states)
        return self.keys, self.values


class _SlidingLayer(DynamicSlidingWindowLayer):
    """Attends to the last `sliding_window` tokens."""

    def __init__(self, length: int, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.room = _Room(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; returns views of the states that any of them attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        self.keys, self.values = self.room.add(key_states, value_states)
        seen = self.sliding_window - 1 + new
        return self.keys[:, :, -seen:], self.values[:, :, -seen:]
