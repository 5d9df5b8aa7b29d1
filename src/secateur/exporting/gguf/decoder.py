"""A decoder as llama.cpp sees it: sizes, windows and context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf


@dataclass(frozen=True)
class LlamaCppDecoder:
    """A decoder as llama.cpp sees it.

    Attributes:
        arch: its architecture there.
        config: the configuration of the base class, with the defaults of transformers.
        head: channels of a head.
        heads: query heads of each layer; 0 where there is no attention.
        kv_heads: KV heads of each layer.
        ffn: FFN neurons of each layer, or of each expert; 0 where there is no FFN.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
        experts: experts of each layer; 0 for a dense model.
    """

    arch: gguf.MODEL_ARCH
    config: Any
    head: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    vocabulary: int
    tied: bool
    experts: int = 0

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.heads)

    @property
    def varied(self) -> bool:
        """Whether its layers differ in size or lack a sub-block."""
        return any(
            len(set(each)) > 1 or 0 in each for each in (self.heads, self.kv_heads, self.ffn)
        )

    @property
    def window(self) -> int | None:
        """The sliding window of some or all layers; None if there is none."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds and "sliding_attention" not in kinds:
            return None
        return getattr(self.config, "sliding_window", None) or None

    @property
    def window_period(self) -> int | None:
        """The period p, where every p-th layer sees all positions; None without such a period."""
        sliding = [kind == "sliding_attention" for kind in self.config.layer_types]
        layers = range(len(sliding))
        for period in range(1, len(sliding) + 2):
            if sliding == [layer % period < period - 1 for layer in layers]:
                return period
        return None
