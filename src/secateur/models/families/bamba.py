"""Bamba: Mamba-2 in most layers, attention in the others, a feed-forward in all."""

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import SPLIT_ATTENTION, Couplings

MAMBA_GROUPS = (("mamba.in_proj",), ("mamba.out_proj",))

MAMBA_AXES = {
    "mamba.in_proj": ("state", "hidden"),
    "mamba.out_proj": ("hidden", "state"),
    "mamba.conv1d": ("state", "state", "state"),
    "mamba.norm": ("state",),
    "mamba.A_log": ("state",),
    "mamba.D": ("state",),
    "mamba.dt_bias": ("state",),
}
"""Mamba-2, whose states are left as they are."""

TIED_STATES = {"hidden": "the states of its Mamba layers are a multiple of the hidden size"}

BAMBA_COUPLINGS = Couplings(
    layer={
        **MAMBA_AXES,
        **SPLIT_ATTENTION,
        "input_layernorm": ("hidden",),
        "feed_forward.gate_proj": ("neurons", "hidden"),
        "feed_forward.up_proj": ("neurons", "hidden"),
        "feed_forward.down_proj": ("hidden", "neurons"),
        "pre_ff_layernorm": ("hidden",),
    },
    outside={
        "model.embed_tokens": ("-", "hidden"),
        "model.final_layernorm": ("hidden",),
        "lm_head": ("-", "hidden"),
    },
    ffn=("feed_forward",),
    ffn_norms=("pre_ff_layernorm",),
    fixed=TIED_STATES,
)

BAMBA = families.register("bamba")(
    Family(
        model_types=("bamba",),
        layers="model.layers",
        groups=(
            *MAMBA_GROUPS,
            *SPLIT_ATTENTION_GROUPS,
            ("feed_forward.gate_proj", "feed_forward.up_proj"),
            ("feed_forward.down_proj",),
        ),
        writers=("mamba.out_proj", "self_attn.o_proj", "feed_forward.down_proj"),
        couplings=BAMBA_COUPLINGS,
    )
)
