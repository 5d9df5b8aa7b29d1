"""Qwen1.5-MoE and Qwen2-MoE: many small experts, and a shared one that every token passes."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": ("-", "hidden"),
    "mlp.shared_expert.up_proj": ("-", "hidden"),
    "mlp.shared_expert.down_proj": ("hidden", "-"),
    "mlp.shared_expert_gate": ("-", "hidden"),
}

QWEN2_MOE = families.register("qwen2_moe")(
    Family(
        model_types=("qwen2_moe",),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GATED_FFN,  # layers may be dense
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            ("mlp.shared_expert.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(Experts()), **SHARED_EXPERT},
            attributes=sizes_of_experts(Experts(), "hidden_dim"),
        ),
        experts=Experts(),
    )
)
