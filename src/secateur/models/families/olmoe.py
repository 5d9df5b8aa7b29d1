"""OLMoE: queries and keys are normalised over all heads; no shared expert."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts()

OLMOE = families.register("olmoe")(
    Family(
        model_types=("olmoe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **expert_axes(EXPERTS),
                "self_attn.q_norm": ("queries",),
                "self_attn.k_norm": ("keys",),
            },
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
