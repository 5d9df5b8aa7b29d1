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
        groups=(
            ("mixer.in_proj",),
            ("mixer.out_proj",),
            ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
            ("mixer.o_proj",),
            ("mixer.up_proj",),
            ("mixer.down_proj",),
        ),
        writers=("mixer.out_proj", "mixer.o_proj", "mixer.down_proj"),
        couplings=Couplings(
            layer={
                "mixer.in_proj": ("state", "hidden"),
                "mixer.out_proj": ("hidden", "state"),
                "mixer.conv1d": ("state", "state", "state"),
                "mixer.norm": ("state",),
                "mixer.A_log": ("state",),
                "mixer.D": ("state",),
                "mixer.dt_bias": ("state",),
                "mixer.q_proj": ("state", "hidden"),
                "mixer.k_proj": ("state", "hidden"),
                "mixer.v_proj": ("state", "hidden"),
                "mixer.o_proj": ("hidden", "state"),
                "mixer.up_proj": ("neurons", "hidden"),
                "mixer.down_proj": ("hidden", "neurons"),
                "norm": ("hidden",),
                **expert_axes(EXPERTS, stream="-"),
            },
            outside={
                "model.embeddings": ("-", "hidden"),
                "model.norm_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="",  # no layer has it besides something else
            ffn=("mixer",),
            ffn_norms=("norm",),
            attributes=sizes_of_experts(EXPERTS),
            fixed={
                "groups": "a layer with attention has nothing else, so the layer can be removed",
                "hidden": "the states of its Mamba layers are a multiple of the hidden size",
            },
        ),
        experts=EXPERTS,
    )
)
