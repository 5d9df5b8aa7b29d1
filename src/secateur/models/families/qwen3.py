"""Qwen3 (dense), also inside Qwen3-VL: Llama's layout with normalised queries and keys."""

from dataclasses import replace

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import HEAD_NORMS, LLAMA_COUPLINGS

QWEN3 = families.register("qwen3")(
    Family(
        model_types=("qwen3", "qwen3_vl_text"),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
        couplings=replace(LLAMA_COUPLINGS, layer={**LLAMA_COUPLINGS.layer, **HEAD_NORMS}),
    )
)
