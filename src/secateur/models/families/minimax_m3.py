"""MiniMax-M3 (text): experts with a clamped gate and a shared one, sparse attention."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(count="num_local_experts")

MINIMAX_M3 = families.register("minimax_m3")(
    Family(
        model_types=("minimax_m3_vl_text",),
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
