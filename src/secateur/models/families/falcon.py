"""Falcon: attention and feed-forward side by side, queries, keys and values fused."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import TWO_NORMS, Couplings

FALCON = families.register("falcon")(
    Family(
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
                "self_attention.query_key_value": ("-", "hidden"),
                "self_attention.dense": ("hidden", "-"),
                "mlp.dense_h_to_4h": ("neurons", "hidden"),
                "mlp.dense_4h_to_h": ("hidden", "neurons"),
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
                "hidden": "its heads are as many as the hidden size has room for",
            },
        ),
    )
)
