"""Qwen3-MoE: many small experts, none shared; normalised queries and keys."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Experts,
    Family,
    families,
)

QWEN3_MOE = families.register("qwen3_moe")(
    Family(
        model_types=("qwen3_moe",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,  # layers may be dense
        writers=PRE_NORM_WRITERS,
        experts=Experts(),
    )
)
