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
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from secateur.models.architecture import Linear, describe, linears_of, setting, text_config

FUSED = ("qkv_proj", "query_key_value", "c_attn")
"""Names of a linear for queries, keys and values together."""

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Names of the linear that reads the values of all heads."""

STATE_BYTES, INPUT_BYTES = 4, 2
"""Of a value: recurrent states are float32 in transformers; inputs of convolutions bfloat16."""


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
        pairs = seen * seen / 2 + (tokens - seen) * seen
        return 2 * pairs * self.width + tokens * self.state_bytes


def layer_caches(model: Any) -> list[LayerCache]:
    """The caches of all decoder layers of a model, loaded or a skeleton.

    transformers says of which kind each layer is; the shapes of its linears say how much it keeps,
    so cut models are counted too. A kind of layer that is unknown counts as full attention.
    """
    layers = describe(model).layers(model)
    config = text_config(model.config)
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    found: list[LayerCache] = []
    stored: dict[str, LayerCache] = {}
    """The last layer of each kind that keeps keys and values: later ones may read them."""
    holders = _holders_of(model.config, len(layers))
    for layer, kind, holder in zip(layers, kinds, holders, strict=False):
        cache = _cache_of(layer, config, holder, stored.get(kind))
        if cache.values:
            stored[kind] = cache
        found.append(cache)
    return found


def _holders_of(config: Any, layers: int) -> list[Any]:
    """The objects in which transformers would keep the caches of so many layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    try:
        found: list[Any] = DynamicCache(config=config).layers
    except KeyError:  # a kind of layer that it does not know
        found = []
    return found + [DynamicLayer() for _ in range(layers - len(found))]


def _cache_of(layer: nn.Module, config: Any, holder: Any, source: LayerCache | None) -> LayerCache:
    """The cache of one decoder layer."""
    from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

    from secateur.models.varied import NoAttention

    recurrent = isinstance(holder, LinearAttentionCacheLayerMixin)
    state = state_bytes(layer) if recurrent else 0
    if recurrent and not hasattr(holder, "keys"):
        return LayerCache(state_bytes=state)
    known = {"q_proj", "k_proj", "kv_a_proj_with_mqa", *FUSED}
    modules = (m for m in layer.modules() if known & {name for name, _ in m.named_children()})
    attention: Any = next(modules, None)
    if any(isinstance(module, NoAttention) for module in layer.modules()):
        return LayerCache()
    if isinstance(holder, DummyLayer):
        if attention is None or source is None:
            return LayerCache()
        width = 2 * _outputs_of(attention, config)
        return LayerCache(read=source.values, window=source.window, width=width, step_width=width)
    window = getattr(holder, "sliding_window", None)
    rank = int(getattr(attention, "kv_lora_rank", None) or 0)
    if rank:
        return _latent_cache(attention, rank, config, window)
    keys, values = _keys_and_values(attention, config)
    width = _outputs_of(attention, config) * (keys + values) // max(1, values)
    kept = keys + values + (int(config.index_head_dim) if hasattr(holder, "indexer_keys") else 0)
    return LayerCache(kept, kept, window, state, width, width)


def _latent_cache(attention: Any, rank: int, config: Any, window: int | None) -> LayerCache:
    """The cache of latent attention, whose heads share a latent vector and a rotary key."""
    rotary, size = int(attention.qk_rope_head_dim), int(attention.v_head_dim)
    heads = _outputs_of(attention, config) // size
    kept = rank + rotary
    width = heads * (int(attention.qk_nope_head_dim) + rotary + size)
    return LayerCache(kept, kept, window, 0, width, heads * (2 * rank + rotary), latent=True)


def _keys_and_values(attention: Any, config: Any) -> tuple[int, int]:
    """How many values the keys and the values of a token have, all KV heads together.

    Where the linears have unknown names, the configuration says it.
    """
    own = _shapes_of(attention)
    if "k_proj" in own:
        keys = own["k_proj"][0]
        return keys, own.get("v_proj", own["k_proj"])[0]
    for name in FUSED:
        if name in own:
            both = own[name][0] - _outputs_of(attention, config)
            return both // 2, both // 2
    heads = setting(config, "num_key_value_heads") or setting(config, "num_attention_heads") or 0
    return heads * _head_size(config), heads * _head_size(config)


def _outputs_of(attention: Any, config: Any) -> int:
    """Query heads times the size of a value: the inputs of the output linear."""
    own = _shapes_of(attention)
    output = next((own[name] for name in OUTPUTS if name in own), None)
    if output is not None:
        return output[1]
    return (setting(config, "num_attention_heads") or 0) * _head_size(config)


def _head_size(config: Any) -> int:
    """The size of a head by the configuration."""
    heads = setting(config, "num_attention_heads") or 1
    return int(setting(config, "head_dim") or config.hidden_size // heads)


def _shapes_of(attention: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of an attention module, by their names; none without a module."""
    children = () if attention is None else attention.named_children()
    weights = ((name, module, getattr(module, "weight", None)) for name, module in children)
    return {
        name: Linear("", module).shape
        for name, module, weight in weights
        if weight is not None and weight.ndim == 2
    }


def state_bytes(layer: nn.Module) -> int:
    """Bytes of the recurrent states of a layer, and of the inputs that its convolutions keep."""
    convolutions = (m.weight for m in layer.modules() if isinstance(m, nn.Conv1d))
    inputs = sum(int(weight.shape[0] * weight.shape[-1]) for weight in convolutions)
    return STATE_BYTES * _states_of(layer) + INPUT_BYTES * inputs


def _states_of(layer: nn.Module) -> int:
    """The number of values in the recurrent states of a layer.

    Mamba (arXiv:2312.00752) and Mamba-2: channels · state size. Gated DeltaNet (arXiv:2412.06464):
    heads · key · value. RG-LRU (arXiv:2402.19427): one value for each channel. Any other linear
    attention: heads · head². A layer with a convolution alone has none.
    """
    found = 0
    others = 0
    for module in layer.modules():
        own: Any = module
        if hasattr(module, "ssm_state_size"):
            found += int(own.intermediate_size * own.ssm_state_size)
        elif hasattr(module, "num_v_heads"):
            found += int(own.num_v_heads * own.head_k_dim * own.head_v_dim)
        elif hasattr(module, "recurrent_param"):
            found += int(own.recurrent_param.numel())
        elif hasattr(module, "head_dim"):
            heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", 0)
            others = int(heads * own.head_dim**2)
    return found or others


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
