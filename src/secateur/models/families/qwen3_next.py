"""Qwen3-Next and Qwen3.5-MoE: gated DeltaNet beside attention; many experts and a shared one."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    TWO_NORMS,
    Couplings,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.expert_layout import Experts
from secateur.models.families.qwen3_5 import DELTANET_AXES

EXPERTS = Experts()

QWEN3_NEXT = families.register("qwen3_next")(
    Family(
        model_types=(
            "qwen3_next",
            "qwen3_5_moe_text",
        ),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **DELTANET_AXES,
                "linear_attn.in_proj_qkvz": ("state", "hidden"),
                "linear_attn.in_proj_ba": ("state", "hidden"),
                **GATED_FFN,
                **TWO_NORMS,
                **expert_axes(EXPERTS),
                "mlp.shared_expert.gate_proj": ("-", "hidden"),
                "mlp.shared_expert.up_proj": ("-", "hidden"),
                "mlp.shared_expert.down_proj": ("hidden", "-"),
                "mlp.shared_expert_gate": ("-", "hidden"),
            },
            outside=EMBEDDING_AND_HEAD,
            attention_norms=("input_layernorm",),
            ffn_norms=("post_attention_layernorm",),
            norm_offset=1.0,
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
