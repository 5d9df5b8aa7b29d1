"""GLM-4 (2024): Llama's attention, gate and up in one matrix."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, families
from secateur.models.couplings import (
    FUSED_GATED_FFN,
    LLAMA_COUPLINGS,
    SPLIT_ATTENTION,
    TWO_NORMS,
)
from secateur.models.families.llama import LLAMA

GLM = families.register("glm")(
    replace(
        LLAMA,
        model_types=("glm",),
        groups=(*SPLIT_ATTENTION_GROUPS, ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        couplings=replace(
            LLAMA_COUPLINGS, layer={**SPLIT_ATTENTION, **FUSED_GATED_FFN, **TWO_NORMS}
        ),
    )
)
