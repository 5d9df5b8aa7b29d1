"""Nemotron-H: Mamba, attention and experts without a gate, which may read a latent space."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import ExpertLayout, Experts

EXPERTS = Experts(
    module="mixer.experts",
    router="mixer.gate",
    count="n_routed_experts",
    layout=ExpertLayout(gated=False),
)

NEMOTRON_H = families.register("nemotron_h")(
    Family(
        model_types=("nemotron_h",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={**expert_axes(EXPERTS, stream="-")},
            outside={},
            attention="",
            ffn=(),
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
