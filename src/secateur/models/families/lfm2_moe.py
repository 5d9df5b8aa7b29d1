"""LFM2-MoE: short convolutions beside attention; a router with a correction."""

from dataclasses import replace

from secateur.models.architecture import Family, families
from secateur.models.couplings import expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts
from secateur.models.families.lfm2 import LFM2_COUPLINGS

EXPERTS = Experts(
    module="feed_forward.experts", router="feed_forward.gate", stored=("w1", "w3", "w2")
)

LFM2_MOE = families.register("lfm2_moe")(
    Family(
        model_types=("lfm2_moe",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=replace(
            LFM2_COUPLINGS,
            layer={
                **LFM2_COUPLINGS.layer,
                **expert_axes(EXPERTS),
                "feed_forward.expert_bias": ("experts",),
            },
            with_neurons={},
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
