"""Qwen3-MoE: many small experts, none shared; normalised queries and keys."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import HEAD_NORMS, LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

QWEN3_MOE = families.register("qwen3_moe")(
    Family(
        model_types=("qwen3_moe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,  # layers may be dense
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(Experts()), **HEAD_NORMS},
            attributes=sizes_of_experts(Experts(), "hidden_dim"),
        ),
        experts=Experts(),
    )
)
