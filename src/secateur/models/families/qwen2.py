"""Qwen2 and Qwen2.5, also inside Qwen2.5-VL: Llama's layout with biases on q, k and v."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import LLAMA_COUPLINGS

QWEN2 = families.register("qwen2")(
    Family(
        model_types=("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
        couplings=LLAMA_COUPLINGS,
    )
)
