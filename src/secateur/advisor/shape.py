"""The sizes of a model that memory, speed and cost depend on."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.advisor.facts import KnownShape

__all__ = ["ModelShape", "known_shape"]


@dataclass(frozen=True)
class ModelShape:
    """Counts of a decoder. Weights are counted as stored: tied ones once.

    Attributes:
        name: for people.
        layers: decoder layers.
        hidden: channels of the residual stream.
        linears: weights of the linears in decoder layers, all experts.
        active: of these, the weights that one token reads.
        embedding: weights of the embedding.
        head: weights of the output head; they count only once with `embedding` where tied.
        tied: whether the head is the embedding.
        other: weights of norms, biases and everything else.
        attention_width: query heads times their size.
        kv_width: KV heads times their size, summed over layers.
        vocabulary: rows of the embedding.
        experts: experts of a layer; 0 for a dense model.
        expert_weights: of `linears`, the weights in experts.
    """

    name: str
    layers: int
    hidden: int
    linears: int
    active: int
    embedding: int
    head: int
    tied: bool
    other: int
    attention_width: int
    kv_width: int
    vocabulary: int
    experts: int = 0
    expert_weights: int = 0

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return self.linears + self.ends + self.other

    @property
    def ends(self) -> int:
        """Weights of embedding and head, tied ones once."""
        return self.embedding if self.tied else self.embedding + self.head

    @property
    def per_token(self) -> int:
        """Weights that multiply one token: active linears and the head."""
        return self.active + self.head

    def scaled(self, linears: float = 1.0, layers: float = 1.0, experts: float = 1.0) -> ModelShape:
        """The shape after a cut.

        Args:
            linears: the fraction of the weights of every layer that stays.
            layers: the fraction of layers that stays.
            experts: the fraction of experts that stays. A token reads as many as before.
        """
        kept = self.linears - self.expert_weights + round(self.expert_weights * experts)
        return ModelShape(
            self.name,
            max(1, round(self.layers * layers)),
            self.hidden,
            round(kept * linears * layers),
            round(self.active * linears * layers),
            self.embedding,
            self.head,
            self.tied,
            round(self.other * layers),
            round(self.attention_width * linears),
            round(self.kv_width * linears * layers),
            self.vocabulary,
            round(self.experts * experts),
            round(self.expert_weights * experts * linears * layers),
        )


def known_shape(name: str, sizes: KnownShape) -> ModelShape:
    """The shape of a decoder of Llama's kind: q, k, v, o; gate, up, down, in each expert.

    attention = hidden · (2 · heads + 2 · kv_heads) · head; FFN = 3 · hidden · ffn, times experts;
    a router has hidden · experts.
    """
    attention = sizes.hidden * sizes.head * 2 * (sizes.heads + sizes.kv_heads)
    ffn = 3 * sizes.hidden * sizes.ffn
    router = sizes.hidden * sizes.experts
    many = sizes.layers * ffn * sizes.experts
    once = sizes.layers * (attention + router + (0 if sizes.experts else ffn))
    embedding = sizes.vocabulary * sizes.hidden
    return ModelShape(
        name,
        sizes.layers,
        sizes.hidden,
        once + many,
        once + sizes.layers * ffn * sizes.experts_per_token,
        embedding,
        embedding,
        sizes.tied,
        sizes.hidden * (2 * sizes.layers + 1),
        sizes.heads * sizes.head,
        sizes.layers * sizes.kv_heads * sizes.head,
        sizes.vocabulary,
        sizes.experts,
        many,
    )
