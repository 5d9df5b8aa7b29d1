"""Granite-MoE: Llama's attention with multipliers; experts stored in one tensor."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(
    module="block_sparse_moe.experts", router="block_sparse_moe.router", count="num_local_experts"
)

GRANITEMOE = families.register("granitemoe")(
    Family(
        model_types=("granitemoe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(EXPERTS)},
            ffn=("block_sparse_moe",),
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
