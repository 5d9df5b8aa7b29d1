"""The sizes of a model that memory, speed and cost depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from secateur.advisor.facts import KnownShape
from secateur.models.layer_cache import LayerCache


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers that have the same cache.

    Attributes:
        layers: how many; a fraction after a cut that keeps a fraction of all layers.
        cache: of one of them.
    """

    layers: float
    cache: LayerCache

    def scaled(self, linears: float, layers: float) -> LayerKind:
        """The same after a cut, as `ModelShape.scaled` has it.

        A latent vector and a state stay as they are: heads are cut, and neither belongs to a head.
        """
        cache, kept = self.cache, 1.0 if self.cache.latent else linears
        return LayerKind(
            self.layers * layers,
            replace(
                cache,
                values=round(cache.values * kept),
                read=round(cache.read * kept),
                width=round(cache.width * linears),
                step_width=round(cache.step_width * linears),
            ),
        )


def kinds_of(caches: Iterable[LayerCache]) -> tuple[LayerKind, ...]:
    """The caches of all layers, equal ones together."""
    return tuple(LayerKind(count, cache) for cache, count in Counter(caches).items())


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
        kinds: what the decoder layers keep of a sequence, and what their attention computes.
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
    kinds: tuple[LayerKind, ...]
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

    @property
    def widest(self) -> int:
        """Values of a token that a layer holds at once: of the stream, or of the queries."""
        return max(self.hidden, *(kind.cache.width // 2 for kind in self.kinds))

    def cache_bytes(self, tokens: int) -> float:
        """The cache of one sequence of so many tokens, in bfloat16; states in float32."""
        return sum(kind.layers * kind.cache.bytes(tokens) for kind in self.kinds)

    def cache_read_bytes(self, tokens: int) -> float:
        """What the next token of one sequence reads of the cache."""
        return sum(kind.layers * kind.cache.read_bytes(tokens) for kind in self.kinds)

    def step_operations(self, tokens: int) -> float:
        """Operations of the next token: 2 for each weight, and attention to so many tokens."""
        attention = sum(kind.layers * kind.cache.step_operations(tokens) for kind in self.kinds)
        return 2 * self.per_token + attention

    def prompt_operations(self, tokens: int) -> float:
        """Operations of a prompt: 2 for each weight and token, and attention."""
        attention = sum(kind.layers * kind.cache.prompt_operations(tokens) for kind in self.kinds)
        return 2 * tokens * self.per_token + attention

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
            tuple(kind.scaled(linears, layers) for kind in self.kinds),
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
    kept, width = 2 * sizes.kv_heads * sizes.head, 2 * sizes.heads * sizes.head
    cache = LayerCache(kept, kept, width=width, step_width=width)
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
        (LayerKind(sizes.layers, cache),),
        sizes.vocabulary,
        sizes.experts,
        many,
    )
