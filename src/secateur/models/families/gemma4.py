"""Gemma 4 (text): experts beside a dense feed-forward, with a scale for each expert."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(module="experts", router="router.proj", chosen="top_k_experts")

GEMMA4 = families.register("gemma4")(
    Family(
        model_types=("gemma4_text",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={**expert_axes(EXPERTS, stream="-"), "router.per_expert_scale": ("experts",)},
            outside={},
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
