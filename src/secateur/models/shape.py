"""The sizes of a decoder, and the memory to run it: weights, caches and activations.

cache    = batch · Σ layers of a kind · bytes of its cache for the context
working  = chunk · (4 · hidden + 2 · widest) · 2 + batch · vocabulary · 4
overhead = (weights + cache + working) · fragmentation + the runtime
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from secateur.models.architecture import describe, linears_of
from secateur.models.layer_cache import LayerCache, layer_caches


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


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What every description of a decoder says.

    Attributes:
        layers: decoder layers.
        hidden: channels of the residual stream.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
        experts: experts of a layer; 0 for a dense model.
    """

    layers: int
    hidden: int
    vocabulary: int
    tied: bool = False
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelShape(DecoderSizes):
    """Counts of a decoder. Weights are counted as stored: tied ones once.

    Attributes:
        name: for people.
        linears: weights of the linears in decoder layers, all experts.
        active: of these, the weights that one token reads.
        embedding: weights of the embedding.
        head: weights of the output head; they count only once with `embedding` where tied.
        other: weights of norms, biases and everything else.
        kinds: what the decoder layers keep of a sequence, and what their attention computes.
        expert_weights: of `linears`, the weights in experts.
    """

    name: str
    linears: int
    active: int
    embedding: int
    head: int
    other: int
    kinds: tuple[LayerKind, ...]
    expert_weights: int = 0

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return self.linears + self.outer + self.other

    @property
    def outer(self) -> int:
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
        return replace(
            self,
            layers=max(1, round(self.layers * layers)),
            linears=round(kept * linears * layers),
            active=round(self.active * linears * layers),
            other=round(self.other * layers),
            kinds=tuple(kind.scaled(linears, layers) for kind in self.kinds),
            experts=round(self.experts * experts),
            expert_weights=round(self.expert_weights * experts * linears * layers),
        )


def counted(name: str, model: Any) -> ModelShape:
    """Count a skeleton."""
    architecture = describe(model)
    layers = architecture.layers(model)
    config = model.config.get_text_config(decoder=True)
    linears = active = in_experts = 0
    mixture = architecture.experts
    experts = mixture.opened_in(layers) if mixture else 0
    taken = (mixture.per_token(config) if mixture else None) or experts
    for index, layer in enumerate(layers):
        for linear in linears_of(layer, architecture.layer_name(index)).values():
            weights = linear.module.weight.numel()  # type: ignore[operator]
            linears += weights
            if experts and architecture.of_expert(linear.name):
                in_experts += weights
                active += round(weights * taken / experts)
            else:
                active += weights
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = bool(getattr(config, "tie_word_embeddings", False)) or embedding is head
    outer = embedding.numel() + (0 if embedding is head else head.numel())
    return ModelShape(
        name=name,
        layers=len(layers),
        hidden=config.hidden_size,
        linears=linears,
        active=active,
        embedding=embedding.numel(),
        head=head.numel(),
        tied=tied,
        other=total - linears - outer,
        kinds=tuple(LayerKind(n, kind) for kind, n in Counter(layer_caches(model)).items()),
        vocabulary=config.vocab_size,
        experts=experts if in_experts else 0,
        expert_weights=in_experts,
    )


FRAGMENTATION = {"cuda": 0.03, "cpu": 0.0}
"""Memory that an allocator cannot use, as a fraction; our estimate for a paged cache."""


RUNTIME_BYTES = {"cuda": round(0.9 * 2**30), "cpu": 185 * 2**20}
"""The context of the driver, kernels and graphs; on a CPU, the code of the model, measured here."""


CHUNK_TOKENS = 512
"""Tokens of a prompt that are processed at once."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes, by use.

    Attributes:
        weights: of the model.
        cache: keys, values and states of all sequences.
        working: activations and logits.
        overhead: fragmentation and the runtime.
    """

    weights: int
    cache: int
    working: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working + self.overhead


def memory_with(
    weights: int, model: ModelShape, kind: str, batch: int, context: int
) -> ServingMemory:
    """The memory for some sequences at once.

    Args:
        weights: their bytes.
        model: its sizes.
        kind: of the device, `cuda` or `cpu`.
        batch: sequences.
        context: tokens of each, prompt and answer together.
    """
    cache = round(batch * model.cache_bytes(context))
    chunk = min(CHUNK_TOKENS, batch * context)
    working = chunk * (4 * model.hidden + 2 * model.widest) * 2 + batch * model.vocabulary * 4
    part = weights + cache + working
    overhead = round(part * FRAGMENTATION[kind]) + RUNTIME_BYTES[kind]
    return ServingMemory(weights, cache, working, overhead)
