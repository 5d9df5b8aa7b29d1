"""Qwen3-Next and Qwen3.5-MoE: gated DeltaNet beside attention; many experts and a shared one."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

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
            layer={**expert_axes(EXPERTS, stream="-")},
            outside={},
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
