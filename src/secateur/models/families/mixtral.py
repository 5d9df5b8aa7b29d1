"""Mixtral: Mistral's attention, and experts of which each token is sent to two."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(stored=("w1", "w3", "w2"), count="num_local_experts")

MIXTRAL = families.register("mixtral")(
    Family(
        model_types=("mixtral",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(EXPERTS)},
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
