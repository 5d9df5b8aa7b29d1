"""Counts the weights of a model, loaded or a skeleton, and what its layers keep of a sequence."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from secateur.models.architecture import Linear, describe, linears_of, setting, text_config
from secateur.models.shape import LayerCache, ModelShape

FUSED = ("qkv_proj", "query_key_value", "c_attn")
"""Names of a linear for queries, keys and values together."""

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Names of the linear that reads the values of all heads."""

STATE_BYTES, INPUT_BYTES = 4, 2
"""Of a value: recurrent states are float32 in transformers; inputs of convolutions bfloat16."""


def layer_caches(model: Any) -> list[LayerCache]:
    """The caches of all decoder layers of a model, loaded or a skeleton.

    transformers says of which kind each layer is; the shapes of its linears say how much it keeps,
    so cut models are counted too. A kind of layer that is unknown counts as full attention.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = describe(model).layers(model)
    config = text_config(model.config)
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    found: list[LayerCache] = []
    stored: dict[str, LayerCache] = {}
    """The last layer of each kind that keeps keys and values: later ones may read them."""
    try:
        holders: list[Any] = DynamicCache(config=model.config).layers
    except KeyError:  # a kind of layer that transformers does not know
        holders = []
    holders = holders + [DynamicLayer() for _ in range(len(layers) - len(holders))]
    for layer, kind, holder in zip(layers, kinds, holders, strict=False):
        cache = _cache_of(layer, config, holder, stored.get(kind))
        if cache.values:
            stored[kind] = cache
        found.append(cache)
    return found


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
        # latent attention: heads share a latent vector and a rotary key
        rotary, size = int(attention.qk_rope_head_dim), int(attention.v_head_dim)
        heads, kept = _outputs_of(attention, config) // size, rank + rotary
        width = heads * (int(attention.qk_nope_head_dim) + rotary + size)
        return LayerCache(kept, kept, window, 0, width, heads * (2 * rank + rotary), latent=True)
    keys, values = _keys_and_values(attention, config)
    # outputs are heads · size of a value, so this is heads · (size of a key + size of a value)
    width = _outputs_of(attention, config) * (keys + values) // max(1, values)
    # sparse attention of DeepSeek keeps a key more, with which its indexer chooses tokens
    kept = keys + values + (int(config.index_head_dim) if hasattr(holder, "indexer_keys") else 0)
    return LayerCache(kept, kept, window, state, width, width)


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
            both = own[name][0] - _outputs_of(attention, config)  # rows beside the queries
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
    """Bytes of the recurrent states of a layer, and of the inputs that its convolutions keep.

    Mamba (arXiv:2312.00752) and Mamba-2: channels · state size. Gated DeltaNet (arXiv:2412.06464):
    heads · key · value. RG-LRU (arXiv:2402.19427): one value for each channel. Any other linear
    attention: heads · head². A layer with a convolution alone has none.
    """
    found = others = inputs = 0
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
        if isinstance(module, nn.Conv1d):
            inputs += int(own.weight.shape[0] * own.weight.shape[-1])
    return STATE_BYTES * (found or others) + INPUT_BYTES * inputs


def counted(name: str, model: Any) -> ModelShape:
    """Count a skeleton."""
    architecture = describe(model)
    layers = architecture.layers(model)
    config = model.config.get_text_config(decoder=True)
    linears = in_experts = 0
    mixture = architecture.experts
    experts = mixture.opened_in(layers) if mixture else 0
    taken = (mixture.per_token(config) if mixture else None) or experts
    for index, layer in enumerate(layers):
        for linear in linears_of(layer, architecture.layer_name(index)).values():
            weights = linear.module.weight.numel()  # type: ignore[operator]
            linears += weights
            if experts and architecture.of_expert(linear.name):
                in_experts += weights
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = bool(getattr(config, "tie_word_embeddings", False)) or embedding is head
    # a tied head is the embedding, and counts once
    outer = embedding.numel() + (0 if embedding is head else head.numel())
    return ModelShape(
        name=name,
        layers=len(layers),
        hidden=config.hidden_size,
        linears=linears,
        active=linears - in_experts + round(in_experts * taken / max(1, experts)),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=tied,
        other=total - linears - outer,
        caches=tuple(Counter(layer_caches(model)).items()),
        vocabulary=config.vocab_size,
        experts=experts if in_experts else 0,
        expert_weights=in_experts,
    )
