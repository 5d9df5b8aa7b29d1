"""DeepSeek V2 and V3, GLM-4.7-Flash, dots.1: latent attention, experts in groups, shared ones."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="n_routed_experts")

DEEPSEEK = families.register("deepseek")(
    Family(
        model_types=(
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe_lite",
            "dots1",
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
