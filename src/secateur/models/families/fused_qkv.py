"""Decoders with queries, keys and values in one matrix."""

from secateur.models.architecture import PRE_NORM_WRITERS, Axes, Couplings, Family, families
from secateur.models.families.llama_like import (
    FUSED_FFN_GROUPS,
    FUSED_GATED_FFN,
    PRE_NORM,
    TWO_NORMS,
)

WIDE_FFN: Axes = {
    "mlp.dense_h_to_4h": ("neurons", "hidden"),
    "mlp.dense_4h_to_h": ("hidden", "neurons"),
}
UNCUT_ATTENTION: Axes = {
    "self_attention.query_key_value": ("-", "hidden"),
    "self_attention.dense": ("hidden", "-"),
}
AS_MANY_HEADS = "its heads are as many as the hidden size has room for"

NEOX = Family(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    groups=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    couplings=Couplings(
        layer={
            **TWO_NORMS,
            "attention.query_key_value": ("triples", "hidden"),
            "attention.dense": ("hidden", "queries"),
            **WIDE_FFN,
        },
        outside={
            "gpt_neox.embed_in": ("-", "hidden"),
            "gpt_neox.final_layer_norm": ("hidden",),
            "lm_head": ("-", "hidden"),
        },
        attention="attention",
        attention_norms=("input_layernorm",),
        ffn_norms=("post_attention_layernorm",),
    ),
)
FALCON = Family(
    model_types=("falcon",),
    layers="transformer.h",
    groups=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    couplings=Couplings(
        layer={
            **TWO_NORMS,  # one, two with other names, or these, whatever the configuration says
            "ln_attn": ("hidden",),
            "ln_mlp": ("hidden",),
            **UNCUT_ATTENTION,
            **WIDE_FFN,
        },
        outside={
            "transformer.word_embeddings": ("-", "hidden"),
            "transformer.ln_f": ("hidden",),
            "lm_head": ("-", "hidden"),
        },
        attention="self_attention",
        neurons_key="ffn_hidden_size",
        fixed={
            "groups": "queries, keys and values lie in one matrix, in an order that each "
            "configuration chooses",
            "hidden": AS_MANY_HEADS,
        },
    ),
)

TABLE = {
    # Conv1D modules, which store the transpose [in, out].
    "gpt2": Family(
        model_types=("gpt2",),
        layers="transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        writers=("attn.c_proj", "mlp.c_proj"),
        couplings=Couplings(
            layer={
                "ln_1": ("hidden",),
                "attn.c_attn": ("queries+keys+keys", "hidden"),
                "attn.c_proj": ("hidden", "queries"),
                "ln_2": ("hidden",),
                "mlp.c_fc": ("neurons", "hidden"),
                "mlp.c_proj": ("hidden", "neurons"),
            },
            outside={
                "transformer.wte": ("-", "hidden"),
                "transformer.wpe": ("-", "hidden"),
                "transformer.ln_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="attn",
            attention_norms=("ln_1",),
            ffn_norms=("ln_2",),
            neurons_key="n_inner",
            attributes={"attn": {"num_heads": "heads", "split_size": "queries"}},
        ),
    ),
    # GPT-NeoX and Pythia: attention and feed-forward side by side.
    "gpt_neox": NEOX,
    # Attention and feed-forward side by side.
    "falcon": FALCON,
    # Queries, keys and values of each head together; positions by ALiBi.
    "bloom": FALCON.like(
        "bloom",
        couplings=Couplings(
            layer={**TWO_NORMS, **UNCUT_ATTENTION, **WIDE_FFN},
            outside={
                "transformer.word_embeddings": ("-", "hidden"),
                "transformer.word_embeddings_layernorm": ("hidden",),
                "transformer.ln_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="self_attention",
            neurons_key="",
            attention_norms=("input_layernorm",),
            ffn_norms=("post_attention_layernorm",),
            fixed={
                "groups": "ALiBi gives every head a slope by its number",
                "hidden": AS_MANY_HEADS,
            },
        ),
    ),
    # Phi-3 and Phi-4: gate and up in one matrix too.
    "phi3": Family(
        model_types=("phi3",),
        layers="model.layers",
        groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), *FUSED_FFN_GROUPS),
        writers=PRE_NORM_WRITERS,
        couplings=PRE_NORM.plus(
            {
                "self_attn.qkv_proj": ("queries+keys+keys", "hidden"),
                "self_attn.o_proj": ("hidden", "queries"),
                **FUSED_GATED_FFN,
            },
            attributes={
                "self_attn": {
                    "num_key_value_heads": "groups",
                    "config.num_attention_heads": "heads",
                }
            },
        ),
    ),
}

for name, family in TABLE.items():
    families.register(name)(family)
