"""Keys and values of text in the making, in tensors that are made once.

The cache that transformers makes by default grows by concatenation: every token copies all keys
and values before it. Here a layer gets its room with the first token, and attention sees a view
of what is filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["roomy_cache"]


def roomy_cache(config: Any, length: int) -> DynamicCache:
    """An empty cache for texts of at most `length` tokens.

    Layers that keep something else than keys and values of each token (recurrent states) stay as
    transformers makes them.

    Args:
        config: of the model.
        length: tokens that there is room for.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _Layer(length)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _SlidingLayer(length, layer.sliding_window)
    return cache


class _Room:
    """A tensor [batch, heads, length, head_dim] and how much of it is filled."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.all: Tensor | None = None

    def add(self, states: Tensor) -> Tensor:
        """Write the states of new tokens behind the others; a view of all of them."""
        if self.all is None:
            batch, heads, _, size = states.shape
            self.all = states.new_empty(batch, heads, self.length, size)
        start, self.filled = self.filled, self.filled + states.shape[-2]
        self.all[:, :, start : self.filled] = states
        return self.all[:, :, : self.filled]


class _Layer(DynamicLayer):
    """Attends to all tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.rooms = _Room(length), _Room(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; views of those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self.rooms[0].add(key_states), self.rooms[1].add(value_states)
        return self.keys, self.values


class _SlidingLayer(DynamicSlidingWindowLayer):
    """Attends to the last `sliding_window` tokens."""

    def __init__(self, length: int, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.rooms = _Room(length), _Room(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens; views of those that one of them attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        self.keys, self.values = self.rooms[0].add(key_states), self.rooms[1].add(value_states)
        seen = self.sliding_window - 1 + new
        return self.keys[:, :, -seen:], self.values[:, :, -seen:]
