"""LFM2-MoE: short convolutions beside attention; a router with a correction."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(
    module="feed_forward.experts", router="feed_forward.gate", stored=("w1", "w3", "w2")
)

LFM2_MOE = families.register("lfm2_moe")(
    Family(
        model_types=("lfm2_moe",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={**expert_axes(EXPERTS, stream="-"), "feed_forward.expert_bias": ("experts",)},
            outside={},
            ffn=("feed_forward",),
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
