"""Phi-3.5-MoE: LayerNorms with biases, and a router that picks two experts in turn."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(router="mlp.router", stored=("w1", "w3", "w2"), count="num_local_experts")

PHIMOE = families.register("phimoe")(
    Family(
        model_types=("phimoe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(EXPERTS)},
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
