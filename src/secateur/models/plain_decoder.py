"""A plain decoder by a few numbers: how the sizes of well-known models are written down.

A plain layer is Llama's: queries, keys, values and an output; a gate, up and down, or a router and
experts that have these three. Any other model is counted from its skeleton
(`secateur.models.counting`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.models.shape import DecoderSizes, LayerCache, ModelShape


@dataclass(frozen=True, kw_only=True)
class PlainDecoder(DecoderSizes):
    """The sizes of a plain decoder, with two norms a layer and no biases.

    Attributes:
        ffn: neurons of the feed-forward, or of each expert.
        heads: query heads.
        kv_heads: KV heads.
        head: channels of a head.
        experts_per_token: experts that compute for a token.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # facts.yaml has such sizes

    ffn: int
    heads: int
    kv_heads: int
    head: int
    experts_per_token: int = 0

    def shape(self, name: str) -> ModelShape:
        """The counts.

        attention = hidden · (2 · heads + 2 · kv_heads) · head; FFN = 3 · hidden · ffn, times
        experts. A router, hidden · experts, is no linear of its layer.
        """
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        ffn = 3 * self.hidden * self.ffn
        many = self.layers * ffn * self.experts
        once = self.layers * (attention + (0 if self.experts else ffn))
        embedding = self.vocabulary * self.hidden
        kept, width = 2 * self.kv_heads * self.head, 2 * self.heads * self.head
        cache = LayerCache(kept, kept, width=width, step_width=width)
        return ModelShape(
            name=name,
            layers=self.layers,
            hidden=self.hidden,
            linears=once + many,
            active=once + self.layers * ffn * self.experts_per_token,
            embedding=embedding,
            head=embedding,
            tied=self.tied,
            other=self.layers * self.hidden * (2 + self.experts) + self.hidden,
            caches=((cache, self.layers),),
            vocabulary=self.vocabulary,
            experts=self.experts,
            expert_weights=many,
        )
