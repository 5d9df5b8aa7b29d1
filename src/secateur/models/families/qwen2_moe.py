"""Qwen1.5-MoE and Qwen2-MoE: many small experts, and a shared one that every token passes."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Experts,
    Family,
    families,
)

QWEN2_MOE = families.register("qwen2_moe")(
    Family(
        model_types=("qwen2_moe",),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GATED_FFN,  # layers may be dense
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            ("mlp.shared_expert.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
        experts=Experts(),
    )
)
