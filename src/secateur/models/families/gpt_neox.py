"""GPT-NeoX and Pythia: fused queries, keys and values; attention and feed-forward side by side."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import TWO_NORMS, Couplings

GPT_NEOX = families.register("gpt_neox")(
    Family(
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
                "mlp.dense_h_to_4h": ("neurons", "hidden"),
                "mlp.dense_4h_to_h": ("hidden", "neurons"),
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
)
