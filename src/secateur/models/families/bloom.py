"""BLOOM: queries, keys and values of each head fused; positions by ALiBi."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import TWO_NORMS, Couplings

BLOOM = families.register("bloom")(
    Family(
        model_types=("bloom",),
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
                **TWO_NORMS,
                "self_attention.query_key_value": ("-", "hidden"),
                "self_attention.dense": ("hidden", "-"),
                "mlp.dense_h_to_4h": ("neurons", "hidden"),
                "mlp.dense_4h_to_h": ("hidden", "neurons"),
            },
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
                "hidden": "its heads are as many as the hidden size has room for",
            },
        ),
    )
)
