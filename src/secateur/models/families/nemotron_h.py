"""Nemotron-H without experts: each layer is Mamba-2, attention or a feed-forward alone."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings

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
            },
            outside={
                "model.embeddings": ("-", "hidden"),
                "model.norm_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="",  # no layer has it besides something else
            ffn=("mixer",),
            ffn_norms=("norm",),
            fixed={
                "groups": "a layer with attention has nothing else, so the layer can be removed",
                "hidden": "the states of its Mamba layers are a multiple of the hidden size",
            },
        ),
    )
)
