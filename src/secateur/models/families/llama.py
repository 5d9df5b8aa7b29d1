"""Llama 1 to 3 and models of the same layout (SmolLM2, TinyLlama, Yi, EXAONE 3, InternLM 3, …)."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import LLAMA_COUPLINGS

LLAMA = families.register("llama")(
    Family(
        model_types=("llama", "cwm", "exaone", "internlm3", "iquestcoder"),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
        couplings=LLAMA_COUPLINGS,
    )
)
