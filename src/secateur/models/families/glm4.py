"""GLM-4-0414: GLM's linears, with a norm after each sub-block too."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import FUSED_GATED_FFN, LLAMA_COUPLINGS, SPLIT_ATTENTION, TWO_NORMS
from secateur.models.families.glm import GLM

GLM4 = families.register("glm4")(
    replace(
        GLM,
        model_types=("glm4",),
        writers=(),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **FUSED_GATED_FFN,
                **TWO_NORMS,
                "post_self_attn_layernorm": ("hidden",),
                "post_mlp_layernorm": ("hidden",),
            },
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            ffn_norms=("post_attention_layernorm", "post_mlp_layernorm"),
        ),
    )
)
