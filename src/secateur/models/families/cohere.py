"""Command R and R7B: one norm, then attention and feed-forward side by side."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import GATED_FFN, LLAMA_COUPLINGS, SPLIT_ATTENTION
from secateur.models.families.llama import LLAMA

COHERE = families.register("cohere")(
    replace(
        LLAMA,
        model_types=("cohere", "cohere2"),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**SPLIT_ATTENTION, **GATED_FFN, "input_layernorm": ("hidden",)},
            attention_norms=(),  # the one norm serves both
            ffn_norms=(),
        ),
    )
)
