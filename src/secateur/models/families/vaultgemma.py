"""VaultGemma: Gemma 2 without the norms after each sub-block."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import GATED_FFN, LLAMA_COUPLINGS, SPLIT_ATTENTION
from secateur.models.families.gemma import GEMMA

VAULTGEMMA = families.register("vaultgemma")(
    replace(
        GEMMA,
        model_types=("vaultgemma",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **GATED_FFN,
                "input_layernorm": ("hidden",),
                "pre_feedforward_layernorm": ("hidden",),
            },
            ffn_norms=("pre_feedforward_layernorm",),
            norm_offset=1.0,
            scaled_embedding=True,
        ),
    )
)
