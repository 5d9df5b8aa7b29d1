"""The sizes of a decoder, and the memory to run it: weights, caches and activations.

cache    = batch · Σ layers of a kind · bytes of its cache for the context
working  = chunk · (4 · hidden + 2 · widest) · 2 + batch · vocabulary · 4
overhead = (weights + cache + working) · fragmentation + the runtime

A decoder layer keeps of a sequence, and its attention reads:

| kind of layer     | it keeps for T tokens                                                       |
|-------------------|-----------------------------------------------------------------------------|
| full attention    | T · (keys + values)                                                         |
| sliding window    | min(T, window) · (keys + values)                                            |
| latent attention  | T · (latent vector + rotary key), however many heads (DeepSeek-V2,          |
|                   | arXiv:2405.04434)                                                           |
| recurrent         | the last inputs of its convolution, and a state: neither grows              |
| shared            | nothing: it reads the keys and values of an earlier layer                   |
| no attention      | nothing                                                                     |

transformers 5 keeps the same, the latent vector of latent attention included, as vLLM and SGLang
do. Between two forwards it keeps window − 1 tokens; with the token in work these are `window`.
Our own loop, on a CPU, has room for whole tiles of 64 tokens, and of a window for those that one
call appends besides (`held_positions`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

CHUNK_TOKENS = 512
"""Tokens of a prompt that are processed at once."""

TILE = 64
"""Positions that our own loop keeps together."""


def held_positions(tokens: int, window: int | None) -> int:
    """For how many positions of so many tokens our own loop has room, in whole tiles.

    A window has a ring. It holds what the next token sees, and CHUNK_TOKENS more: one call may
    append as many, and a text may go back by as many. The last tile is for windows that begin
    within a tile. So no two tiles that a call touches have the same place.
    """
    tiles = -(-tokens // TILE)
    if window:
        tiles = min(tiles, -(-(window + CHUNK_TOKENS - 2) // TILE) + 1)
    return tiles * TILE


@dataclass(frozen=True)
class LayerCache:
    """The cache and the attention of one decoder layer.

    Attributes:
        values: that each token adds to the cache: keys and values of all KV heads, or the latent
            vector and the rotary key.
        read: values of each token that a step reads: `values`, or those of another layer.
        window: the most tokens that are kept and seen; None for all.
        state_bytes: of a recurrent state and the inputs of its convolution, for one sequence.
        width: query heads · (size of a key + size of a value), in a prompt.
        step_width: the same when one token is decoded. Latent attention then multiplies with the
            latent vector itself: heads · (2 · latent + rotary).
        latent: whether `values` are those of latent attention, which cut heads leave as they are.
    """

    values: int = 0
    read: int = 0
    window: int | None = None
    state_bytes: int = 0
    width: int = 0
    step_width: int = 0
    latent: bool = False

    def seen(self, tokens: float) -> float:
        """How many of the last tokens are kept: min(tokens, window)."""
        return tokens if self.window is None else min(tokens, self.window)

    def bytes(self, tokens: int, itemsize: int = 2) -> float:
        """What is kept of one sequence: seen · values · itemsize + state."""
        return self.seen(tokens) * self.values * itemsize + self.state_bytes

    def held_bytes(self, tokens: int, itemsize: int = 2) -> float:
        """What our own loop holds of one sequence, as `bytes`."""
        return held_positions(tokens, self.window) * self.values * itemsize + self.state_bytes

    def read_bytes(self, tokens: int, itemsize: int = 2) -> float:
        """What the next token of one sequence reads: seen · read · itemsize + state."""
        return self.seen(tokens) * self.read * itemsize + self.state_bytes

    def step_operations(self, tokens: int) -> float:
        """Operations of the next token after so many: 2 · seen · step_width + 4 of a state value.

        A state s costs two multiplications and two additions: s ← a · s + b · x, y = c · s.
        """
        return 2 * self.seen(tokens) * self.step_width + self.state_bytes

    def prompt_operations(self, tokens: int) -> float:
        """Operations of a whole prompt: the tokens that each token sees, summed, likewise.

        The sum is T² / 2, and beyond a window of W tokens W² / 2 + (T − W) · W.
        """
        seen = self.seen(tokens)
        # a triangle of the first tokens, then a band as wide as the window
        pairs = seen * seen / 2 + (tokens - seen) * seen
        return 2 * pairs * self.width + tokens * self.state_bytes

    def scaled(self, linears: float) -> LayerCache:
        """The same after a cut that keeps a fraction of the weights of the layer.

        A latent vector and a state stay as they are: heads are cut, and neither belongs to a head.
        """
        kept = 1.0 if self.latent else linears
        return replace(
            self,
            values=round(self.values * kept),
            read=round(self.read * kept),
            width=round(self.width * linears),
            step_width=round(self.step_width * linears),
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
        caches: what decoder layers keep of a sequence, and how many layers keep that; a fraction
            after a cut that keeps a fraction of all layers.
        expert_weights: of `linears`, the weights in experts.
    """

    name: str
    linears: int
    active: int
    embedding: int
    head: int
    other: int
    caches: tuple[tuple[LayerCache, float], ...]
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
        """Weights that multiply a decoded token: active linears and the head."""
        return self.active + self.head

    @property
    def widest(self) -> int:
        """Values of a token that a layer holds at once: of the stream, or of the queries."""
        return max(self.hidden, *(cache.width // 2 for cache, _ in self.caches))

    def cache_bytes(self, tokens: int) -> float:
        """The cache of one sequence of so many tokens, in bfloat16; states in float32."""
        return sum(layers * cache.bytes(tokens) for cache, layers in self.caches)

    def held_bytes(self, tokens: int, kind: str) -> float:
        """The same as a kind of device holds it: our own loop, on a CPU, has rings of tiles."""
        if kind != "cpu":
            return self.cache_bytes(tokens)
        return sum(layers * cache.held_bytes(tokens) for cache, layers in self.caches)

    def cache_read_bytes(self, tokens: int) -> float:
        """What the next token of one sequence reads of the cache."""
        return sum(layers * cache.read_bytes(tokens) for cache, layers in self.caches)

    def step_operations(self, tokens: int) -> float:
        """Operations of the next token: 2 for each weight, and attention to so many tokens."""
        attention = sum(layers * cache.step_operations(tokens) for cache, layers in self.caches)
        return 2 * self.per_token + attention

    def prompt_operations(self, tokens: int) -> float:
        """Operations of a prompt: 2 for each weight and token, and attention.

        The head multiplies the last token alone.
        """
        attention = sum(layers * cache.prompt_operations(tokens) for cache, layers in self.caches)
        return 2 * (tokens * self.active + self.head) + attention

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
            caches=tuple((cache.scaled(linears), n * layers) for cache, n in self.caches),
            experts=round(self.experts * experts),
            expert_weights=round(self.expert_weights * experts * linears * layers),
        )


@dataclass(frozen=True, kw_only=True)
class PlainDecoder(DecoderSizes):
    """The sizes of a plain decoder: Llama's, or one whose feed-forwards are experts.

    It has two norms a layer and no biases. Any other model is counted (`secateur.models.counting`).

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


LARGE_ENDS = 0.1
"""From this share of a model's bytes on, `compress` stores embedding and head in int8 beside
linears of integers."""


FRAGMENTATION = {"cuda": 0.03, "llama.cpp": 0.0, "cpu": 0.0}
"""Memory that an allocator cannot use, as a fraction; our estimate for a paged cache."""


RUNTIME_BYTES = {"cuda": round(0.9 * 2**30), "llama.cpp": 300 * 2**20, "cpu": 185 * 2**20}
"""The context of the driver, kernels and graphs, our estimates; on a CPU, the code of the model,
measured here."""


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
    cache = round(batch * model.held_bytes(context, kind))
    chunk = min(CHUNK_TOKENS, batch * context)
    working = chunk * (4 * model.hidden + 2 * model.widest) * 2 + batch * model.vocabulary * 4
    part = weights + cache + working
    overhead = round(part * FRAGMENTATION[kind]) + RUNTIME_BYTES[kind]
    return ServingMemory(weights, cache, working, overhead)
