"""DeepSeek V2 and V3, GLM-4.7-Flash: latent attention, experts in groups, shared ones."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    SHARED_EXPERTS,
    TWO_NORMS,
    Couplings,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="n_routed_experts")

LATENT_ATTENTION = {
    "self_attn.q_proj": ("parts", "hidden"),
    "self_attn.q_a_proj": ("-", "hidden"),
    "self_attn.q_a_layernorm": ("-",),
    "self_attn.q_b_proj": ("parts", "-"),
    "self_attn.kv_a_proj_with_mqa": ("-", "hidden"),
    "self_attn.kv_a_layernorm": ("-",),
    "self_attn.kv_b_proj": ("parts", "-"),
    "self_attn.o_proj": ("hidden", "queries"),
}
"""Queries, keys and values of all heads come from short vectors, which stay whole."""

DEEPSEEK = families.register("deepseek")(
    Family(
        model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **LATENT_ATTENTION,
                **GATED_FFN,
                **TWO_NORMS,
                **expert_axes(EXPERTS),
                **SHARED_EXPERTS,
            },
            outside=EMBEDDING_AND_HEAD,
            attention_norms=("input_layernorm",),
            ffn_norms=("post_attention_layernorm",),
            attributes={"self_attn": {"num_heads": "heads"}, **sizes_of_experts(EXPERTS)},
        ),
        experts=EXPERTS,
    )
)
