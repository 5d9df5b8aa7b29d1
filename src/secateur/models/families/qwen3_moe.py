"""Qwen3-MoE: many small experts, none shared; normalised queries and keys."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Experts,
    Family,
    families,
)
from secateur.models.couplings import FUSED_EXPERTS, HEAD_NORMS, LLAMA_COUPLINGS, SIZES_OF_EXPERTS

QWEN3_MOE = families.register("qwen3_moe")(
    Family(
        model_types=("qwen3_moe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,  # layers may be dense
        writers=PRE_NORM_WRITERS,
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **FUSED_EXPERTS, **HEAD_NORMS},
            attributes=SIZES_OF_EXPERTS,
        ),
        experts=Experts(),
    )
)
