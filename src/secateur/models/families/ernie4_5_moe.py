"""ERNIE 4.5 MoE: a router with a correction, shared experts, dense first layers."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import LLAMA_COUPLINGS, SHARED_EXPERTS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="moe_num_experts")

ERNIE4_5_MOE = families.register("ernie4_5_moe")(
    Family(
        model_types=("ernie4_5_moe",),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GATED_FFN,  # the first layers are dense
            ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ("mlp.shared_experts.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **expert_axes(EXPERTS),
                **SHARED_EXPERTS,
                "mlp.gate.moe_statics.e_score_correction_bias": ("-", "experts"),
            },
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
