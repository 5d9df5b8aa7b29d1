"""Qwen3 (dense): Llama's layout with normalised queries and keys."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)

QWEN3 = families.register("qwen3")(
    Family(
        model_types=("qwen3",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
    )
)
