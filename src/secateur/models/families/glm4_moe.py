"""GLM-4.5 and later, dots.1: a router with a correction, a shared expert, dense first layers."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import (
    HEAD_NORMS,
    LLAMA_COUPLINGS,
    SHARED_EXPERTS,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="n_routed_experts")

GLM4_MOE = families.register("glm4_moe")(
    Family(
        model_types=("glm4_moe", "dots1"),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GATED_FFN,  # the first layers are dense
            ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ("mlp.shared_experts.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **HEAD_NORMS, **expert_axes(EXPERTS), **SHARED_EXPERTS},
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
