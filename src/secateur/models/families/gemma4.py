"""Gemma 4 (text): experts beside a dense feed-forward; per-layer embeddings in small models."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts
from secateur.models.families.gemma3n import (
    FFN_OF_A_FIXED_STREAM,
    LATE_LAYERS_READ,
    OF_EACH_LAYER,
    PER_LAYER_INPUT,
    UNCUT_ATTENTION,
)

EXPERTS = Experts(module="experts", router="router.proj", chosen="top_k_experts")

GEMMA4 = families.register("gemma4")(
    Family(
        model_types=("gemma4_text",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **UNCUT_ATTENTION,
                **FFN_OF_A_FIXED_STREAM,
                **PER_LAYER_INPUT,
                **expert_axes(EXPERTS, stream="-"),
                "router.scale": ("-",),
                "router.per_expert_scale": ("experts",),
                "post_feedforward_layernorm_1": ("-",),
                "post_feedforward_layernorm_2": ("-",),
                "pre_feedforward_layernorm_2": ("-",),
                "layer_scalar": ("-",),
            },
            outside=OF_EACH_LAYER,
            attributes=sizes_of_experts(EXPERTS),
            fixed={
                "groups": f"global layers have heads of another size, and {LATE_LAYERS_READ}",
                "hidden": "its router and per-layer embeddings scale with the hidden size",
            },
        ),
        experts=EXPERTS,
    )
)
