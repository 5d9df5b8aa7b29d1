"""EXAONE 4: norms after each block, heads normalised, local and global layers."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import GATED_FFN, HEAD_NORMS, LLAMA_COUPLINGS, SPLIT_ATTENTION
from secateur.models.families.olmo2 import OLMO2

EXAONE4 = families.register("exaone4")(
    replace(
        OLMO2,
        model_types=("exaone4",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **GATED_FFN,
                **HEAD_NORMS,
                "post_attention_layernorm": ("hidden",),
                "post_feedforward_layernorm": ("hidden",),
            },
            attention_norms=("post_attention_layernorm",),
            ffn_norms=("post_feedforward_layernorm",),
        ),
    )
)
