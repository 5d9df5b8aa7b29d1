"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another."""

from dataclasses import replace

from secateur.models.architecture import PRE_NORM_WRITERS, Family, families
from secateur.models.couplings import FUSED_GATED_FFN, LLAMA_COUPLINGS, TWO_NORMS

PHI3 = families.register("phi3")(
    Family(
        model_types=("phi3",),
        layers="model.layers",
        groups=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **TWO_NORMS,
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
    )
)
