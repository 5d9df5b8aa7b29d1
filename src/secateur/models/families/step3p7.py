"""Step 3.7: a gate for each query head; clamped experts, stored by projection."""

from dataclasses import replace

from secateur.models.architecture import Family, families
from secateur.models.couplings import (
    HEAD_NORMS,
    LLAMA_COUPLINGS,
    SHARED_EXPERTS,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="n_routed_experts", stacked="moe")
EXPERT_SIZES = sizes_of_experts(EXPERTS, "hidden_dim")

STEP3P7 = families.register("step3p7")(
    Family(
        model_types=("step3p5",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **HEAD_NORMS,
                "self_attn.g_proj": ("heads", "hidden"),
                **expert_axes(EXPERTS),
                **SHARED_EXPERTS,
            },
            attributes={"self_attn": {"num_heads": "heads"}, **EXPERT_SIZES},
        ),
        experts=EXPERTS,
    )
)
